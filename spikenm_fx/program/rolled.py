# SPDX-License-Identifier: Apache-2.0
"""A loop over time whose steps read what the step before made, rolled up.

A neuron that is code in a forward, a readout that integrates, spikes that are fed back: all of
these carry values from step to step.  The second step of the loop says what every step does; where
it reads what the first step made, there is a state.  Which value of a step is stored for the next
one shows in the third step, which reads it in the same place.  What the first step was given
instead is how the state starts.  The first step itself is not looked at otherwise: the comparison
of the program with the model tells whether it was like the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from spikenm_fx._torch import tree_flatten
from spikenm_fx.program.axes import Atom, Axes, Layout, size_of
from spikenm_fx.program.calls import Call
from spikenm_fx.program.code import Code
from spikenm_fx.program.draft import Draft, First, NotLowered, Ref, Value
from spikenm_fx.program.products import per_number
from spikenm_fx.trace.analysis.ops import op_name

__all__ = ["Rolled"]

STEPS = 3
"""Steps of a loop that are needed to see what it carries."""


@dataclass(eq=False, slots=True)
class _Carried:
    """A state: what a step reads of the step before.

    Attributes:
        value: as a step reads it.
        axes: of it.
        first: what made it in the first step.
        source: what is stored for the next step, once that is known.
    """

    value: Value
    axes: Axes
    first: fx.Node
    source: Value | None = None


class Rolled:
    """Finds what the steps of a loop carry, and makes states of it.

    Args:
        draft: of the program.
        nodes: all recorded operations.
    """

    def __init__(self, draft: Draft, nodes: list[fx.Node]) -> None:
        self.draft, self.nodes = draft, nodes
        self.firsts: list[fx.Node] = []
        self._carried: list[_Carried] = []
        self._read: list[_Carried] = []  # in the order in which the second step reads them
        self._places: dict[int, int] = {}  # by step: how many states it has read
        self.constants: dict[fx.Node, Tensor] = {}
        self._second: dict[Any, int] = {}  # how often the second step did each kind of operation

    def is_first(self, leaves: list[Any]) -> bool:
        """Whether an operation belongs to the first step: it reads that alone."""
        steps = [leaf.step for leaf in leaves if isinstance(leaf, Ref) and leaf.step is not None]
        return max(steps, default=0) == 0 and bool(
            steps or any(isinstance(leaf, First) for leaf in leaves)
        )

    def first(self, node: fx.Node) -> First:
        """Note an operation of the first step."""
        info = node.meta.get("value")
        self.firsts.append(node)
        return First(node, None if info is None else info.shape)

    def settled(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The operands with a state in the place of each that the step before made.

        Args:
            node: the operation.
            args: its operands.
            kwargs: by name.

        Raises:
            NotLowered: where what the steps carry cannot be told.
        """
        leaves = tree_flatten((args, kwargs))[0]
        steps = {leaf.step for leaf in leaves if isinstance(leaf, Ref) and leaf.step is not None}
        if not steps or max(steps) == 0:
            return args, kwargs
        step = max(steps)
        if step == 1:
            key = _kind(node)
            self._second[key] = self._second.get(key, 0) + 1
        late = steps - {step, step - 1}
        if late:
            raise NotLowered(_where(node), "it reads what was made more than one step before")
        siblings = [leaf for leaf in leaves if isinstance(leaf, Ref) and leaf.step == step]

        def settle(given: Any) -> Any:
            if isinstance(given, list | tuple):
                return type(given)(map(settle, given)) if not hasattr(given, "_fields") else given
            is_late = isinstance(given, Ref) and given.step == step - 1
            if not is_late and not isinstance(given, First):
                return given
            carried = self._of(node, step, given, args, siblings)
            return Ref(carried.value, carried.axes, step)

        return settle(args), {name: settle(value) for name, value in kwargs.items()}

    def stacked(self, members: Any) -> Any:
        """Steps of one value, of which the first one is known by the others."""
        if not isinstance(members, list | tuple) or len(members) < 2:
            return members
        first, second = members[0], members[1]
        if isinstance(first, First) and isinstance(second, Ref) and second.step == 1:
            return [replace(second, step=0), *members[1:]]
        return members

    def finish(self) -> None:
        """Store every state.

        Raises:
            NotLowered: for one of which no step says what it is.
        """
        for carried in self._carried:
            where = _where(carried.first)
            if carried.source is None:
                raise NotLowered(
                    where,
                    f"it carries a state, which {STEPS} time steps show: give such examples",
                )
            source = carried.source
            if source.layout.size != carried.value.layout.size:
                raise NotLowered(where, "its state changes its shape from step to step")
            if source.bits and self._reads_bits(carried.value):
                carried.value.bits = True
            elif source.bits:
                source = self.draft.floats(Ref(source, carried.axes)).value
            self.draft.store(carried.value, source, where)

    def _reads_bits(self, value: Value) -> bool:
        either = (Code.LAYER, Code.JOIN, Code.AFFINE, Code.STRIDED)
        recall = next(op for op in self.draft.ops if op.outputs[:1] == (value.number,))
        readers = [op for op in self.draft.ops if value.number in op.inputs]
        return not recall.tensors and all(op.code in either for op in readers)

    # -- one state --------------------------------------------------------------------------------

    def _of(
        self, node: fx.Node, step: int, given: First | Ref, args: Any, siblings: list[Ref]
    ) -> _Carried:
        if step == 1:
            if not isinstance(given, First):
                raise NotLowered(_where(node), "it reads the first step's input in the second one")
            found = next((c for c in self._carried if c.first is given.node), None)
            if found is None:
                found = self._new(node, given, args, siblings)
                self._carried.append(found)
            self._read.append(found)
            return found
        place = self._places.get(step, 0)
        self._places[step] = place + 1
        if place >= len(self._read):
            raise NotLowered(_where(node), "its steps differ from each other")
        found = self._read[place]
        if not isinstance(given, Ref) or (found.source or given.value) is not given.value:
            raise NotLowered(_where(node), "its steps differ from each other")
        if tuple(map(size_of, given.axes)) != tuple(map(size_of, found.axes)):
            raise NotLowered(_where(node), "its state changes its shape from step to step")
        found.source = given.value
        return found

    def _new(self, node: fx.Node, given: First, args: Any, siblings: list[Ref]) -> _Carried:
        layout, axes = self._like(node, given, args, siblings[0])
        if self.draft.time is not None:  # a state changes, whatever it meets
            layout = layout.over(self.draft.time)
        initial = self._initial(node, given, replace(siblings[0], axes=axes))
        where = _where(given.node)
        forgets = not self._kept(given.node)
        value = self.draft.recall(layout, where, bits=False, forgets=forgets, initial=initial)
        return _Carried(value, axes, given.node)

    def _kept(self, first: fx.Node) -> bool:
        """Whether a module around the operation keeps states from call to call, as it says."""
        scope = str(first.target) if first.op == "call_module" else first.meta.get("scope") or ""
        parts = scope.split(".") if scope else []
        outer = (".".join(parts[:n]) for n in range(len(parts) + 1))
        modules = [self.draft.model.get_submodule(name) for name in outer]
        if first.op == "call_module":
            modules = modules[:-1]
        return any(vars(module).get("_memories") for module in modules)

    def _like(self, node: fx.Node, given: First, args: Any, like: Ref) -> tuple[Layout, Axes]:
        """The layout of a state: that of what it meets, or, where it is concatenated, alike."""
        old, shape = like.value.layout, tuple(map(size_of, like.axes))
        if old.channels is None:
            raise NotLowered(
                _where(node), "it comes before any layer, so that its channels are not known"
            )
        if given.shape == shape and op_name(node) != "cat":
            return old, like.axes
        if op_name(node) == "cat" and given.shape is not None and len(given.shape) == len(shape):
            given_at: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
            at = int(given_at) % len(shape)
            alike = all(
                a == b for i, (a, b) in enumerate(zip(shape, given.shape, strict=True)) if i != at
            )
            if alike and like.axes[at] == old.channels:
                channels = (Atom(given.shape[at], "channels"),)
                rest = [a for a in old.atoms if a not in old.channels]
                lead, pixels = list(old.lead), [a for a in rest if a not in old.lead]
                layout = Layout((*lead, *channels, *pixels), channels, old.height, old.width)
                return layout, (*like.axes[:at], channels, *like.axes[at + 1 :])
        raise NotLowered(_where(node), "it carries a state of another shape than what it meets")

    def _initial(self, node: fx.Node, given: First, like: Ref) -> Tensor | None:
        """What the first step was given in the state's place; None for zeros, or if unknown."""
        key = _kind(node)
        alike = [n for n in self.firsts if _kind(n) == key]
        at = self._second.get(key, 1) - 1
        if at >= len(alike):
            return None
        place = next((i for i, n in enumerate(node.args) if n is given.node), None)
        if place is None or place >= len(alike[at].args):
            return None
        start = alike[at].args[place]
        found = start
        if isinstance(start, fx.Node):
            found = self.constants.get(start, start.meta.get("tensor"))
        if isinstance(found, int | float) and not isinstance(found, bool):
            return torch.tensor([float(found)])
        if not isinstance(found, Tensor) or not bool(found.any()):
            return None
        return self._of_a_token(node, like, found.detach().float())

    def _of_a_token(self, node: fx.Node, like: Ref, found: Tensor) -> Tensor | None:
        """A tensor that is the same in all samples, as the numbers of a token lie."""
        if found.numel() > 1 and found.dim() != len(like.axes):
            return None
        for axis, group in enumerate(like.axes if found.numel() > 1 else ()):
            if group and all(atom in like.value.layout.lead for atom in group):
                one = found.narrow(axis, 0, 1)
                if not torch.equal(found, one.expand_as(found)):
                    return None
                found = one
        try:
            return per_number(Call(self.draft, node, _where(node), (), {}, None), like, found)
        except NotLowered:
            return None


def _kind(node: fx.Node) -> Any:
    return node.target if node.op == "call_module" else op_name(node), node.meta.get("scope")


def _where(node: fx.Node) -> str:
    name = str(node.target) if node.op == "call_module" else op_name(node)
    return f"{name} in {node.meta.get('scope') or 'the forward'}"
