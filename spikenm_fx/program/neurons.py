# SPDX-License-Identifier: Apache-2.0
"""Neurons as operations: over all steps of a call, or step by step in a loop of the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spikenm_fx.pack.eligible import hooked
from spikenm_fx.pack.engine.neuron import NeuronRule
from spikenm_fx.program.axes import Atom, Layout, size_of
from spikenm_fx.program.code import Code, Op
from spikenm_fx.program.draft import Draft, First, NotLowered, Ref, Rest, State, Value
from spikenm_fx.program.layers import Layers
from spikenm_fx.program.tokens import as_steps, outside
from spikenm_fx.trace import NeuronSpec
from spikenm_fx.trace.analysis.nodes import op_name_or_none
from spikenm_fx.trace.neurons.recurrent import Recurrence, recurrence_of

__all__ = ["Neurons", "Returned"]


@dataclass(frozen=True, slots=True)
class Returned:
    """Spikes and state, as a neuron returns them.

    Attributes:
        spikes: what it emits.
        state: its membrane, where that is what it returns; else a state that only it can read.
    """

    spikes: Ref
    state: Ref | State


EMITS = {"spike": 0, "analog": 1, "integer": 2}


class Neurons:
    """Lowers calls of neurons.

    Args:
        draft: of the program.
        layers: lowers what recurrent neurons multiply by.
        specs: of all neurons, by name.
        calls: how often the forward calls each of them.
    """

    def __init__(
        self,
        draft: Draft,
        layers: Layers,
        specs: Mapping[str, NeuronSpec],
        calls: Mapping[str, int],
    ) -> None:
        self.draft, self.layers, self.calls = draft, layers, calls
        self.specs: dict[str, NeuronSpec] = {}
        self.recurrences: dict[str, Recurrence] = {}
        for name, spec in specs.items():
            found = recurrence_of(draft.model.get_submodule(name), spec)
            if found is not None:
                self.recurrences[name] = found
            self.specs[name] = spec if found is None else found.spec
        self._made: dict[str, tuple[int, Op, Value, Ref]] = {}  # input, operation, spikes, membrane
        self.inputs: list[tuple[Op, tuple[str, Ref]]] = []

    def call(self, name: str, module: Any, ref: Ref, given: tuple[Any, ...]) -> Any:
        """One call of a neuron.

        Args:
            name: of the module.
            module: the neuron.
            ref: its input.
            given: the state that the caller hands over; empty where it hands over none.

        Returns:
            The spikes, or :class:`Returned` where the module returns its state as well.
        """
        spec = self.specs[name]
        self._refuse(name, module, spec, ref)
        if spec.time_axis is not None:
            spikes, membrane = self._all_steps(name, spec, ref, given)
            return Returned(spikes, State(name, -1)) if spec.returns_state else spikes
        step = ref.step
        if step is None and self.calls[name] > 1:
            step = self.draft.steps.get(name, 0)
        forgets = self._carried(name, step, given)
        self._check_step(name, step)
        ref = self._driven(name, ref)
        spikes, membrane = self._op(name, spec, ref, timed=step is not None, forgets=forgets)
        spikes, membrane = (Ref(r.value, r.axes, step) for r in (spikes, membrane))
        if step is None:
            self.draft.whole.append((spikes.value.layout, name))
        if not spec.returns_state:
            return spikes
        shows = spec.framework == "snntorch" and spec.synapse is None
        return Returned(spikes, membrane if shows else State(name, step or 0))

    def pass_first(self, name: str) -> None:
        """A neuron's call in the first step of a loop, which the others tell enough of."""
        self.draft.steps[name] = self.draft.steps.get(name, 0) + 1

    def _refuse(self, name: str, module: Any, spec: NeuronSpec, ref: Ref) -> None:
        what = f"{spec.framework} {spec.class_name}"
        if not spec.exact:
            raise NotLowered(
                name,
                f"the update rule of {what} is not fully known; describe it with "
                "spikenm_fx.trace.register_neuron(cls, read=...)",
                rule=True,
            )
        if hooked(module) or "forward" in vars(module):
            raise NotLowered(name, "hooks, or a forward set on the instance, see its spikes")
        if getattr(module, "store_v_seq", False):
            raise NotLowered(name, "it stores its membranes (store_v_seq); switch that off")
        emits = EMITS.get(spec.output)
        later = spec.reset_timing != "now" and (
            emits != 0 or (spec.reset_timing == "corrected" and spec.reset == "hard")
        )
        integrates = spec.kind == "integrator"
        if emits is None or later or (emits == 1) != integrates:
            raise NotLowered(name, f"what {what} emits ({spec.output}) has no operation")

    def _carried(self, name: str, step: int | None, given: tuple[Any, ...]) -> bool:
        """Whether the caller carries the state: then each forward starts at rest."""
        states = [self._state(name, x) for x in given if x is not None]
        if not given or not self.specs[name].returns_state:
            return False
        if not states or all(isinstance(s, Rest) for s in states):
            if (step or 0) > 0:
                raise NotLowered(name, "it starts at rest again within one forward")
            return True
        if any(not isinstance(s, State) or s.neuron != name for s in states):
            raise NotLowered(name, "its state comes from elsewhere than its own last step")
        if any(isinstance(s, State) and s.step != (step or 0) - 1 for s in states):
            raise NotLowered(name, "its state is not that of the step before")
        return True

    def _state(self, name: str, given: Any) -> Any:
        if isinstance(given, First):
            node = given.node
            while op_name_or_none(node) == "getitem":
                node = node.all_input_nodes[0]
            return State(name, 0) if str(node.target) == name else given
        if isinstance(given, tuple):
            parts = [self._state(name, part) for part in given]
            return parts[0] if parts and all(type(p) is type(parts[0]) for p in parts) else given
        if isinstance(given, Ref):  # snnTorch hands its membrane on, and spikes that it feeds back
            made = self._made.get(name)
            own = () if made is None else (made[3].value, made[2])[: 1 + (name in self.recurrences)]
            if any(given.value is value for value in own) and given.step is not None:
                return State(name, given.step)
        return given

    def _check_step(self, name: str, step: int | None) -> None:
        if step is None:
            return
        if step != self.draft.steps.get(name, 0):
            raise NotLowered(name, "a loop calls it in another order than that of the time steps")
        self.draft.steps[name] = step + 1

    def _all_steps(
        self, name: str, spec: NeuronSpec, ref: Ref, given: tuple[Any, ...]
    ) -> tuple[Ref, Ref]:
        assert spec.time_axis is not None
        if ref.step is not None or self.calls[name] > 1:
            raise NotLowered(name, "it steps through time itself, and is called more than once")
        if any(not isinstance(x, Rest) and x is not None for x in given):
            raise NotLowered(name, "it is given a state")
        axis = self._folded(spec, ref) if spec.folded_time else ref.axes[spec.time_axis]
        if not axis and not spec.folded_time:  # of size 1, made in the forward: a single step
            spikes, membrane = self._op(
                name, spec, self._driven(name, ref), timed=False, forgets=spec.returns_state
            )
            self.draft.whole.append((spikes.value.layout, name))
            return spikes, membrane
        if axis and all(atom in ref.value.layout.features for atom in axis):
            ref = as_steps(self.draft, name, ref, spec.time_axis)
            axis = ref.axes[spec.time_axis]
        if len(axis) != 1 or axis[0] in ref.value.layout.features:
            inside = outside(self.draft, ref, axis[1:])
            why = f"axis {spec.time_axis} of its input is not time alone"
            raise NotLowered(name, why, inside=inside)
        self.draft.set_time(axis[0], name)
        ref = self._driven(name, ref.renewed())
        return self._op(name, spec, ref, timed=True, forgets=spec.returns_state)

    def _folded(self, spec: NeuronSpec, ref: Ref) -> tuple[Atom, ...]:
        """The part that is time of an axis that time and batch share."""
        group = ref.axes[0]
        if len(group) == 1 and self.draft.time is None and spec.time_axis == 1:
            batch, steps = spec.folded_batch, spec.folded_steps
            if batch is None and steps is not None and group[0].size % steps == 0:
                batch = group[0].size // steps
            if batch is None or not self.draft.fold(group[0], batch):
                return group
            self.draft.folded = ("batch", batch) if spec.folded_batch else ("steps", steps or 0)
            group = ref.renewed().axes[0]
        return group[:1] if spec.time_axis == 0 else group[-1:]

    def _op(
        self, name: str, spec: NeuronSpec, ref: Ref, *, timed: bool, forgets: bool
    ) -> tuple[Ref, Ref]:
        if name not in self._made:
            self._made[name] = self._make(name, spec, ref, timed=timed, forgets=forgets)
        number, _, spikes, membrane = self._made[name]
        if number != ref.value.number:
            raise NotLowered(name, "it is called on different inputs, and has one state for all")
        return Ref(spikes, ref.axes), Ref(membrane.value, ref.axes)

    def _make(
        self, name: str, spec: NeuronSpec, ref: Ref, *, timed: bool, forgets: bool
    ) -> tuple[int, Op, Value, Ref]:
        source, layout = self.draft.floats(ref), ref.value.layout
        if timed and self.draft.time not in layout.lead:
            layout = self._with_time(name, layout)
        recurrence, recalled = self.recurrences.get(name), None
        if recurrence is not None:
            empty = recurrence.starts_empty  # what is fed back is kept, not the spikes
            bits = spec.output == "spike" and not empty
            recalled = self.draft.recall(layout, name, bits=bits, forgets=forgets or empty)
            fed = Ref(recalled, ref.axes)
            if not empty:
                fed = self._fed_back(name, recurrence, fed)
            summed = self.draft.apply(Code.JOIN, layout, source, fed, settings=(0,), name=name)
            source = Ref(summed, ref.axes)
        table = self._parameters(name, spec, ref)
        rule = NeuronRule.of(spec, table.shape[1])
        assert rule is not None
        spikes = self.draft.value(layout, bits=spec.output == "spike")
        membrane = self.draft.value(layout)
        outputs = (spikes.number, membrane.number)
        settings = (*rule.modes(), EMITS[spec.output], int(forgets), self.draft.new_state())
        stored = self.draft.keep(f"{name}::neuron", table)
        op = Op(Code.NEURON, (source.value.number,), outputs, settings, (stored,), name)
        self.inputs.append((op, (name, ref)))
        self.draft.ops.append(op)
        if recurrence is not None and recalled is not None:
            kept = spikes
            if recurrence.starts_empty:
                kept = self._fed_back(name, recurrence, Ref(spikes, ref.axes)).value
            self.draft.store(recalled, kept, name)
        return ref.value.number, op, spikes, Ref(membrane, ref.axes)

    def _driven(self, name: str, ref: Ref) -> Ref:
        """What a neuron with input weights of its own makes of its input."""
        recurrence = self.recurrences.get(name)
        if recurrence is None or recurrence.inputs is None:
            return ref
        sizes = tuple(map(size_of, ref.axes))
        return self.layers.layer(
            recurrence.name(name, recurrence.inputs_key), recurrence.inputs, ref, sizes
        )

    def _fed_back(self, name: str, recurrence: Recurrence, spikes: Ref) -> Ref:
        """What a neuron adds to its input for its spikes of the step before."""
        if isinstance(recurrence.feedback, Tensor):
            made = self.draft.scaled(spikes, recurrence.feedback, 0.0, name)
            return replace(spikes, value=made)
        sizes = tuple(map(size_of, spikes.axes))
        return self.layers.layer(recurrence.name(name), recurrence.feedback, spikes, sizes)

    def _with_time(self, name: str, layout: Layout) -> Layout:
        """A loop that gives the same input in every step: its neurons make time."""
        if layout.channels is None:
            raise NotLowered(name, "it comes before any layer, so that its channels are not known")
        if self.draft.time is None:
            self.draft.time = Atom(self.calls[name], "time")
            self.draft.constant_steps = self.calls[name]
        return layout.over(self.draft.time)

    def _parameters(self, name: str, spec: NeuronSpec, ref: Ref) -> Tensor:
        """``(8, 1)`` or ``(8, channels)``: the rule's rows, and the membrane at rest.

        A ninth row is the least that the membrane may be.
        """
        rule = NeuronRule.of(spec, 1)
        if rule is None:
            channels = ref.value.layout.channels
            if channels is None or channels not in ref.axes:
                raise NotLowered(name, "its parameters run along an axis that is not channels")
            at = ref.axes.index(channels) - len(ref.axes)
            rule = NeuronRule.of(spec, size_of(channels))
            if rule is None or not _along(spec, at):
                raise NotLowered(name, "its parameters do not run along the channels")
        rows = [rule.parameters, rule.initial[None]]
        if spec.floor is not None:
            rows.append(torch.full_like(rows[1], spec.floor))
        return torch.cat(rows).contiguous()


def _along(spec: NeuronSpec, axis: int) -> bool:
    """Whether the rule's tensors run along ``axis``, as torch would broadcast them."""
    values = [spec.decay, spec.gain, spec.threshold, spec.rest, spec.bias, spec.reset_value]
    values += [] if spec.reset_amount is None else [spec.reset_amount]
    values += [] if spec.synapse is None else [spec.synapse.decay, spec.synapse.gain]
    return all(
        value.dim() >= -axis and value.shape[axis] == value.numel()
        for value in values
        if isinstance(value, Tensor) and value.numel() > 1
    )
