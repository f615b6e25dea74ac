# SPDX-License-Identifier: Apache-2.0
"""What one time step of a model computes: parts with names, and who feeds whom with what delay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from spikenm_fx.trace import NeuronSpec

__all__ = ["Flow", "Lead", "OtherLayout", "Part", "State", "StepGraph", "Unreadable", "Zero"]

Lead = tuple[str, ...]
"""What a tensor's leading axes run over: ``("T", "N")``, ``("N",)``, folded ``("TN",)``, ..."""

PartKind = Literal["input", "layer", "norm", "neuron", "pool", "flatten", "output"]


class Unreadable(Exception):
    """The trace holds something that one step of a network of layers and neurons cannot say."""


class OtherLayout(Unreadable):
    """The input's axes are not what was tried."""


class Zero:
    """A tensor of zeros: a state before the first step."""


class State:
    """A neuron's state, which only this neuron may read."""

    def __init__(self, neuron: str) -> None:
        self.neuron = neuron


@dataclass(slots=True)
class Part:
    """One part of a network.

    Attributes:
        name: qualified name of its module; for a functional one made from what feeds it.
        kind: what it is.
        shape: of one sample's output in one step.
        module: the module, or None.
        spec: of a neuron.
        options: of a pool: ``kernel_size``, ``stride``, ``padding``, each a pair, and ``op``.
    """

    name: str
    kind: PartKind
    shape: tuple[int, ...]
    module: nn.Module | None = None
    spec: NeuronSpec | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class StepGraph:
    """The parts of a model and their connections.

    Attributes:
        parts: by name, in the order of the first call.
        edges: source, target and delay in steps, 0 or 1.
        lead: the leading axes of the model's input.
        notes: what the model does around its steps, which is left to the caller.
        leads: the leading axes of what each module emits.
        sizes: of the axes; without ``"T"`` one call of the model is one step.
    """

    parts: dict[str, Part]
    edges: list[tuple[str, str, int]]
    lead: Lead
    notes: list[str]
    leads: dict[str, Lead]
    sizes: dict[str, int]

    def sources(self, name: str) -> list[str]:
        """Who feeds a part, of this step or of the one before."""
        return [source for source, target, _ in self.edges if target == name]

    def targets(self, name: str) -> list[str]:
        """Whom a part feeds."""
        return [target for source, target, _ in self.edges if source == name]

    def bypass(self, name: str) -> None:
        """Take out a part with one source: its targets are fed by that."""
        (source,) = self.sources(name)
        self.edges = [(source if s == name else s, t, d) for s, t, d in self.edges if t != name]
        del self.parts[name]


@dataclass(frozen=True, slots=True)
class Flow:
    """A tensor of the trace: a sum of parts' outputs at a time step.

    Attributes:
        terms: part and step each; the step is None for a whole sequence and for what is the same
            in each step.
        lead: its leading axes.
        shape: of one sample in one step.
        over_time: what was done over steps to get it, in words; "" where nothing.
        summed: of how many steps it is the sum; 0 where it is none.
    """

    terms: tuple[tuple[str, int | None], ...]
    lead: Lead
    shape: tuple[int, ...]
    over_time: str = ""
    summed: int = 0
