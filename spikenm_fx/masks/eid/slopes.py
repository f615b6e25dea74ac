# SPDX-License-Identifier: Apache-2.0
"""Surrogate slopes of the neurons behind a layer, brought to the outputs of the layer.

Where an adapter knows the neuron they are computed from its rule, else the neuron runs once more.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.masks.eid.eligibility import filtered_slopes, has_known_slope
from spikenm_fx.masks.eid.replay import Call, replayed_slopes, runs_through_time
from spikenm_fx.trace import NeuronSpec, neuron_spec

__all__ = ["Neuron", "Source", "Use", "in_layer_order", "samples_seen", "slopes_at", "slopes_of"]


@dataclass(slots=True)
class Use:
    """One call of a layer."""

    order: int
    inputs: Tensor
    shape: torch.Size
    output: Tensor | None  # with its graph, only until the layer's place is known


@dataclass(slots=True, eq=False, weakref_slot=True)
class Source:
    """One watched layer and the neurons behind it."""

    name: str
    layer: nn.Module
    posts: list[Neuron] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    same_order: bool | None = None  # do neuron inputs lie in memory as the layer's outputs do?
    mapped: list[Tensor] = field(default_factory=list)  # slopes brought back through the graph
    closed: int = -1  # the step in which a backward pass has reached it
    late: bool = False  # whether it is seen in recomputations inside backward
    alone: bool = False  # whether it was called without a module around it that would show
    connected: bool = False  # whether the neurons behind it were looked for
    pending: list[Tensor] = field(default_factory=list)  # outputs, while a graph is made
    closing: Any = None  # of the hook on the weight by which compiled graphs tell of backward

    def __getstate__(self) -> dict[str, Any]:
        # activations are not copied
        return _state(self) | {"uses": [], "mapped": [], "pending": [], "closing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _set_state(self, state)

    def close_at_backward(self, step: int) -> None:
        """Look at no further forward of ``step`` once a gradient reaches the weight."""
        weight = self.layer._parameters.get("weight")
        if self.closing is None and weight is not None and weight.requires_grad:
            self.closing = weight.register_hook(partial(_close, weakref.ref(self), step))

    def forget(self) -> None:
        """Let go of what was kept of a step."""
        self.uses.clear()
        self.mapped.clear()
        if self.closing is not None:
            self.closing.remove()
            self.closing = None

    def put_aside(self) -> tuple[Any, ...]:
        """What is kept of this step; nothing is, afterwards."""
        kept = (self.uses, self.mapped, self.late)
        self.uses, self.mapped = [], []
        return kept

    def take_back(self, kept: tuple[Any, ...]) -> None:
        """Keep of this step what was kept before :meth:`put_aside`, which returned it."""
        self.uses, self.mapped, self.late = kept

    @property
    def lent(self) -> bool:
        """Whether functional_call has put another weight in the layer's place for now."""
        return not isinstance(self.layer._parameters.get("weight"), nn.Parameter)

    @property
    def frozen(self) -> bool:
        """Whether nobody trains the layer's weight: its masks learn nothing from credits."""
        weight = self.layer._parameters.get("weight")
        return weight is None or not weight.requires_grad


@dataclass(slots=True, eq=False)
class Neuron:
    """One watched neuron."""

    name: str
    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    slopes: list[Tensor] | None = None
    failed: bool = False
    through_time: bool | None = None
    known: NeuronSpec | None = None  # of this step
    late: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return _state(self) | {"calls": [], "slopes": None, "known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _set_state(self, state)

    def put_aside(self) -> tuple[Any, ...]:
        """What is kept of this step; nothing is, afterwards."""
        kept = (self.calls, self.slopes, self.late)
        self.calls, self.slopes = [], None
        return kept

    def take_back(self, kept: tuple[Any, ...]) -> None:
        """Keep of this step what was kept before :meth:`put_aside`, which returned it."""
        self.calls, self.slopes, self.late = kept

    def catch_up(self) -> None:
        """Find out of calls in compiled graphs what could not be asked there."""
        for call in self.calls:
            self.learn_time(call)
            call.starts = call.starts or self.spec().step_mode == "multi"

    def spec(self) -> NeuronSpec:
        """With the values its parameters have in this step."""
        if self.known is None:
            self.known = neuron_spec(self.module)
            assert self.known is not None
        if self.through_time:
            return replace(self.known, time_axis=0, step_mode="multi")
        return self.known

    def learn_time(self, call: Call) -> None:
        """Find out whether a neuron that no adapter knows steps through time by itself."""
        spec = self.spec()
        if self.through_time is None and spec.framework == "unknown":
            with contextlib.suppress(Exception):  # the user's code, called out of its context
                self.through_time = runs_through_time(self.module, spec, call)


def _close(source: weakref.ref[Source], step: int, grad: Tensor) -> None:
    reached = source()
    if reached is not None:
        reached.closed = step


def _state(one: Source | Neuron) -> dict[str, Any]:
    return {each.name: getattr(one, each.name) for each in fields(one)}


def _set_state(one: Source | Neuron, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(one, name, value)


def slopes_at(source: Source) -> list[Tensor] | None:
    """Slopes at the outputs of each use of the layer; None where they cannot be brought there."""
    if source.mapped:
        return list(source.mapped) if len(source.mapped) == len(source.uses) else None
    if source.same_order is False:
        return None
    sizes = [use.shape.numel() for use in source.uses]
    found: list[list[tuple[int, Tensor]]] = []
    for neuron in source.posts:
        if neuron.slopes is None and neuron.calls:
            neuron.slopes = slopes_of(neuron, neuron.spec(), neuron.calls)
        if neuron.slopes is None:
            return None
        flat = [in_layer_order(slope, neuron.spec(), len(source.uses)) for slope in neuron.slopes]
        found.append([(c.order, s) for c, s in zip(neuron.calls, flat, strict=True)])
    counts = [sum(len(slope) for _, slope in one) for one in found]
    if all(count == sum(sizes) for count in counts):  # one output drives them all
        merged = torch.stack([torch.cat([slope for _, slope in one]) for one in found]).sum(0)
    elif sum(counts) == sum(sizes):  # a layer used in turn before several neurons
        in_turn = sorted((pair for one in found for pair in one), key=lambda pair: pair[0])
        merged = torch.cat([slope for _, slope in in_turn])
    else:
        return None
    parts = merged.split(sizes)
    return [part.view(use.shape) for part, use in zip(parts, source.uses, strict=True)]


def in_layer_order(values: Tensor, spec: NeuronSpec, uses: int) -> Tensor:
    """Values at a neuron's input, flat, in the order in which its layer gave them.

    Args:
        values: of the shape of what the neuron got in one call.
        spec: of the neuron.
        uses: calls of the layer; with more than one it was called step by step, time comes first.
    """
    if uses > 1 and spec.time_axis:
        values = values.movedim(spec.time_axis, 0)
    return values.flatten()


def slopes_of(neuron: Neuron, spec: NeuronSpec, calls: list[Call]) -> list[Tensor] | None:
    """Slopes of each call at the neuron's input, filtered by its leak; None where it cannot run.

    Args:
        neuron: whose slopes; one that could not run is not tried again.
        spec: of it, in this step.
        calls: in the order they came.
    """
    if neuron.failed:
        return None
    if has_known_slope(spec) and not spec.folded_time:
        try:
            return _known_slopes(spec, calls)
        except (TypeError, ValueError, RuntimeError):
            pass  # e.g. a surrogate of another signature: the neuron itself knows it
    try:
        return replayed_slopes(neuron.module, spec, calls)
    except Exception as error:  # the user's code, called out of its context
        neuron.failed = True
        warnings.warn(
            f"{neuron.name} ({spec.class_name}) could not be run by itself "
            f"({type(error).__name__}: {error}); layers before it learn without EID. "
            "spikenm_fx.trace.register_neuron can tell its rule",
            SpikeNMWarning,
            stacklevel=2,
        )
        return None


def _known_slopes(spec: NeuronSpec, calls: list[Call]) -> list[Tensor]:
    if spec.time_axis is not None:
        axis = spec.time_axis
        return [
            filtered_slopes(spec, call.current.movedim(axis, 0)).movedim(0, axis) for call in calls
        ]
    slopes: list[Tensor] = []
    sequence: list[Tensor] = []
    for call in calls:
        if call.starts and sequence:
            slopes += filtered_slopes(spec, torch.stack(sequence))
            sequence = []
        sequence.append(call.current)
    return [*slopes, *filtered_slopes(spec, torch.stack(sequence))]


def samples_seen(neuron: Neuron) -> int:
    """Samples seen: batch sizes of all sequences, together."""
    axis = neuron.spec().time_axis
    total = 0
    for call in neuron.calls:
        if call.starts:
            shape = list(call.current.shape)
            if axis is not None:
                del shape[axis]
            total += shape[0] if len(shape) > 1 else 1
    return total
