# SPDX-License-Identifier: Apache-2.0
"""A program while it is made: values with named axes, and operations that are made once.

A forward that loops over time records every operation once per step.  Here each step's operations
find those of the first step again: they do the same to the same value, at another step.  So a value
has all its steps, and a :class:`Ref` says which of them is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikenm_fx.errors import PackError
from spikenm_fx.program.axes import Atom, Axes, Layout, fresh
from spikenm_fx.program.code import Code, Op

__all__ = ["REST", "Draft", "First", "NotLowered", "Partial", "Ref", "Rest", "State", "Value"]


class NotLowered(PackError):
    """A network that has no program: the message names the part and says why.

    Args:
        where: qualified name of the part, or "".
        why: a sentence.
        carries: it is one that does not hold where a loop's steps are read with what they carry.
        inside: axes of the batch for which it does not hold where they are axes of each token.
        rule: it is a neuron's rule, which its own code may tell.
    """

    def __init__(
        self,
        where: str,
        why: str,
        *,
        carries: bool = False,
        inside: tuple[Atom, ...] = (),
        rule: bool = False,
    ) -> None:
        super().__init__(f"{where}: {why}" if where else why)
        self.where, self.why, self.carries = where, why, carries
        self.inside, self.rule = inside, rule


@dataclass(eq=False, slots=True)
class Value:
    """What one operation gives, at all steps.

    Attributes:
        number: in the program.
        layout: its axes.
        bits: whether it is spikes.
    """

    number: int
    layout: Layout
    bits: bool = False


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the forward: a value, the order of its axes, and the step where it is one."""

    value: Value
    axes: Axes
    step: int | None = None

    def renewed(self) -> Ref:
        """The same, in the atoms that its atoms were split into since."""
        axes = tuple(map(fresh, self.axes))
        return self if axes == self.axes else replace(self, axes=axes)

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """All of its axes' parts, in order."""
        return tuple(atom for group in self.axes for atom in group)


@dataclass(frozen=True, slots=True)
class Partial:
    """The sum of a value's first steps, as a loop adds them up."""

    value: Value
    axes: Axes
    count: int


@dataclass(frozen=True, slots=True)
class State:
    """What a neuron hands on to its next step."""

    neuron: str
    step: int


@dataclass(frozen=True, slots=True, eq=False)
class First:
    """What the first step of a loop made.

    Attributes:
        node: that made it.
        shape: of it.
    """

    node: fx.Node
    shape: tuple[int, ...] | None


class Rest:
    """A state before the first step: zeros, or nothing at all."""

    def __repr__(self) -> str:
        return "a state at rest"


REST = Rest()


@dataclass(eq=False, slots=True)
class Draft:
    """The program so far.

    Attributes:
        model: whose modules the operations were.
        values: by number.
        ops: in order.
        tensors: of all operations, by name.
        time: the axis of time, once it is known.
        whole: layouts of which no atom may turn out to be time, with the module that says so.
        steps: how far each neuron that a loop calls has come.
        constant_steps: where no axis of the input is time, but a loop calls neurons often.
        folded: what is fixed of the samples and steps that share the input's first axis.
        states: how many the operations keep so far.
    """

    model: nn.Module
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    time: Atom | None = None
    whole: list[tuple[Layout, str]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    constant_steps: int = 0
    folded: tuple[str, int] | None = None
    states: int = 0
    _made: dict[Hashable, tuple[Value, ...]] = field(default_factory=dict)

    def value(self, layout: Layout, *, bits: bool = False) -> Value:
        """A new value."""
        made = Value(len(self.values), layout, bits)
        self.values.append(made)
        return made

    def split(self, atom: Atom, outer: int) -> bool:
        """Cut an axis of channels in two everywhere; False where it is another axis.

        Args:
            atom: to cut.
            outer: size of its outer part.
        """
        layouts = {id(v.layout): v.layout for v in self.values if atom in v.layout.atoms}
        if any(atom not in (layout.channels or ()) for layout in layouts.values()):
            return False
        first, last = Atom(outer, atom.label), Atom(atom.size // outer, atom.label)
        atom.parts = (first, last)
        for layout in layouts.values():
            layout.atoms, layout.channels = fresh(layout.atoms), fresh(layout.channels or ())
        return True

    def fold(self, atom: Atom, batch: int) -> bool:
        """Cut an axis into batch and time everywhere; False where that is impossible."""
        layouts = {id(v.layout): v.layout for v in self.values if atom in v.layout.atoms}
        if atom.size % batch or any(atom in layout.features for layout in layouts.values()):
            return False
        atom.parts = (Atom(batch, "batch"), Atom(atom.size // batch, "time"))
        for layout in layouts.values():
            layout.atoms = fresh(layout.atoms)
        return True

    def same(self, atoms: tuple[Atom, ...], others: tuple[Atom, ...]) -> bool:
        """Let axes of one input be those of another one; False where they cannot be.

        Args:
            atoms: time or batch of one input, in any order.
            others: as many of the other one.
        """
        if len(atoms) != len(others):
            return False
        pairs = [(a, b) for a, b in zip(atoms, others, strict=True) if a is not b]
        layouts = [value.layout for value in self.values]
        for a, b in pairs:
            both = any(a in layout.atoms and b in layout.atoms for layout in layouts)
            features = any(x in layout.features for layout in layouts for x in (a, b))
            if a.size != b.size or both or features or a.parts or b.parts:
                return False
        for a, b in pairs:
            if b is self.time or a is not self.time:
                a.parts = (b,)
            else:
                b.parts = (a,)
        for layout in layouts:
            layout.atoms = fresh(layout.atoms)
        return True

    def once(
        self, key: Hashable, make: Callable[[], tuple[Value, ...]], *refs: Ref
    ) -> tuple[Value, ...]:
        """What ``make`` gives for these operands, made at their first step.

        Args:
            key: what is done, settings included.
            make: adds the operation.
            refs: the operands.
        """
        full = (key, *(ref.value.number for ref in refs))
        if full not in self._made:
            self._made[full] = make()
        return self._made[full]

    def apply(
        self,
        code: Code,
        layout: Layout,
        *refs: Ref,
        settings: tuple[int, ...] = (),
        tensors: tuple[str | None, ...] = (),
        bits: bool = False,
        name: str = "",
    ) -> Value:
        """The value of a stateless operation; the same operands give the same value."""

        def make() -> tuple[Value, ...]:
            made = self.value(layout, bits=bits)
            inputs = tuple(ref.value.number for ref in refs)
            self.ops.append(Op(code, inputs, (made.number,), settings, tensors, name))
            return (made,)

        return self.once((code, settings, tensors), make, *refs)[0]

    def new_state(self) -> int:
        """The number of one more state."""
        self.states += 1
        return self.states - 1

    def recall(
        self, layout: Layout, name: str, *, bits: bool, forgets: bool, initial: Tensor | None = None
    ) -> Value:
        """What the step before stored (:meth:`store`).

        Args:
            layout: of what will be stored.
            name: of the part that it belongs to.
            bits: it will be spikes.
            forgets: each forward starts at rest.
            initial: before the first step, of shape ``(1,)`` or one per channel; None for zeros.
        """
        made = self.value(layout, bits=bits)
        tensors: tuple[str | None, ...] = ()
        if initial is not None and bool(initial.any()):
            rows = initial.detach().float().reshape(1, -1).contiguous()
            tensors = (self.keep(f"{name}::initial", rows),)
        settings = (self.new_state(), int(forgets))
        self.ops.append(Op(Code.RECALL, (), (made.number,), settings, tensors, name))
        return made

    def store(self, recalled: Value, value: Value, name: str) -> None:
        """Keep a value for the next step.

        Args:
            recalled: what that step reads it as.
            value: of its size.
            name: of the part that it belongs to.
        """
        recall = next(op for op in self.ops if op.outputs[:1] == (recalled.number,))
        self.ops.append(Op(Code.STORE, (value.number,), (), recall.settings[:1], (), name))

    def keep(self, name: str, tensor: Tensor) -> str:
        """Store a tensor of any shape under a name of its own, and give that."""
        found, number = name, 2
        while found in self.tensors and not _equal(self.tensors[found], tensor):
            found, number = f"{name}#{number}", number + 1
        self.tensors[found] = tensor
        return found

    def set_time(self, atom: Atom, where: str) -> None:
        """Say that an axis is time.

        Raises:
            NotLowered: if another one is.
        """
        if self.time is not None and self.time is not atom:
            raise NotLowered(
                where, "it steps along another axis than the parts before it", inside=(atom,)
            )
        self.time = atom

    def step_of(self, where: str, *refs: Ref) -> int | None:
        """The step that operands share; those without time are the same in every step.

        Raises:
            NotLowered: if they are of different steps.
        """
        steps = {ref.step for ref in refs if ref.step is not None}
        whole = any(self.time in ref.atoms for ref in refs if self.time is not None)
        if len(steps) > 1 or (steps and whole):
            raise NotLowered(
                where, "it mixes time steps, so that it has no order of its own", carries=True
            )
        return steps.pop() if steps else None

    def mean_of(self, ref: Ref) -> Ref | None:
        """The mean over time, where ``ref`` is the sum over time; else None."""
        made = next(op for op in reversed(self.ops) if ref.value.number in op.outputs)
        if made.code is not Code.REDUCE or made.settings != (0,):
            return None
        source = Ref(self.values[made.inputs[0]], ref.axes)
        return replace(ref, value=self.apply(Code.REDUCE, ref.value.layout, source, settings=(1,)))

    def floats(self, ref: Ref) -> Ref:
        """The same numbers, as floats where they are bits."""
        if not ref.value.bits:
            return ref
        return replace(ref, value=self.scaled(ref, 1.0, 0.0))

    def scaled(self, ref: Ref, factor: Any, shift: Any, name: str = "") -> Value:
        """``factor * ref + shift``, numbers or one per channel."""
        rows = torch.stack(
            [torch.as_tensor(x, dtype=torch.float32).reshape(-1) for x in (factor, shift)]
        )
        stored = self.keep(f"{name or 'scale'}::affine", rows.contiguous())
        layout = ref.value.layout
        return self.apply(Code.AFFINE, layout, ref, tensors=(stored,), name=name)


def _equal(a: Tensor, b: Tensor) -> bool:

    return a.dtype == b.dtype and torch.equal(a, b)
