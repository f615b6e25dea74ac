# SPDX-License-Identifier: Apache-2.0
"""What tells rounding and ties from errors: of one tensor, and of one neuron's spikes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikenm_fx.trace import NeuronSpec, membranes

__all__ = ["ROUNDING", "NeuronDifference", "difference", "first_margin"]

ROUNDING = 1e-4
"""How far rounding moves the input of a neuron or its membrane, relative to its largest value."""


@dataclass(slots=True)
class NeuronDifference:
    """One neuron layer of an engine, on the spikes that it would see in the model.

    Attributes:
        name: qualified name.
        spikes: how many values it put out, zeros included.
        others: how many of them differ from the model's.
        steps: time steps that it ran.
        received: largest difference of its input, relative to the largest magnitude of that input
            in the model.
        margin: largest distance of the model's membrane from the threshold where a spike of its is
            the first that differs, relative to the largest membrane; None where none differs, or
            where the membrane is not known.
        inner: largest difference of what the weight layers inside it (recurrent ones) give on the
            inputs that they have in the model, relative as ``received``.
    """

    name: str
    spikes: int = 0
    others: int = 0
    steps: int = 0
    received: float = 0.0
    margin: float | None = None
    inner: float = 0.0

    @property
    def share(self) -> float:
        """Share of the spikes that differ."""
        return self.others / self.spikes


def difference(x: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors of one shape, relative to the largest magnitude wanted.

    Infinity where only one of them is not finite.
    """
    if not x.numel() or torch.equal(x, wanted):
        return 0.0
    if x.dtype == torch.bool or not (x.is_floating_point() or x.is_complex()):
        x, wanted = x.double(), wanted.double()
    worst = float((x - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    return worst if worst == worst else float("inf")


def first_margin(
    spec: NeuronSpec, received: list[Tensor], emitted: list[Tensor], differing: list[Tensor]
) -> float | None:
    """How far off its threshold a membrane was where the first of its spikes differs.

    Later spikes of the same membrane differ with its state.

    Args:
        spec: the neuron's rule.
        received: what it took in the model, one tensor of any shape per call, from rest on.
        emitted: its spikes.
        differing: where the engine's are others.

    Returns:
        None unless the rule that is known of the neuron gives its spikes: then the membrane is
        known as well.
    """
    if not spec.exact or spec.folded_time or (spec.time_axis is not None and len(received) > 1):
        return None
    axis = spec.time_axis
    x, spikes, differs = (
        torch.stack(calls) if axis is None else calls[0].movedim(axis, 0)
        for calls in (received, emitted, differing)
    )
    if x.shape != spikes.shape:
        return None
    h = membranes(spec, x)
    fires = h > spec.threshold if spec.strict else h >= spec.threshold
    distance = (h - spec.threshold).abs() / h.abs().max().clamp_min(1e-30)
    if bool(((fires != spikes.bool()) & (distance > ROUNDING)).any()):
        return None
    first = differs & (differs.cumsum(0) == 1)
    return float(distance[first].max())
