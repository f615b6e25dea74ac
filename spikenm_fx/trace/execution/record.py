# SPDX-License-Identifier: Apache-2.0
"""The raw material that tracing leaves for the analyses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from spikenm_fx.trace.execution.values import InnerCall
from spikenm_fx.trace.graph import Note, Route
from spikenm_fx.trace.neurons.spec import NeuronSpec

__all__ = ["Trace"]


@dataclass(slots=True)
class Trace:
    """The raw material of a graph.

    Attributes:
        model: the model.
        graph: recorded operations; None without a trace.
        neurons: the neuron modules' specs by name.
        route: how it was obtained.
        notes: what to tell.
        inner: layers called inside leaves.
        computed: layers whose mask would not hold, and why.
        shown_states: modules whose state is among the model's outputs.
    """

    model: nn.Module
    graph: fx.Graph | None
    neurons: Mapping[str, NeuronSpec]
    route: Route
    notes: list[Note] = field(default_factory=list)
    inner: dict[str, InnerCall] = field(default_factory=dict)
    shown_states: set[str] = field(default_factory=set)
    computed: Mapping[str, str] = field(default_factory=dict)
