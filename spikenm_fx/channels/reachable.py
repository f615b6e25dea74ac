# SPDX-License-Identifier: Apache-2.0
"""Whether a membrane can ever reach its threshold, from the largest input of any time step."""

from __future__ import annotations

import torch
from torch import Tensor

from spikenm_fx.trace import NeuronSpec
from spikenm_fx.trace.neurons.spec import Scalar

__all__ = ["can_spike"]

_MARGIN = 1e-4
"""Share of the threshold that a bound must stay below it: the model may round in float32."""


def can_spike(spec: NeuronSpec, largest: Tensor) -> Tensor:
    """Bool, of the shape of ``largest``: False where no sequence of inputs makes a spike.

    With ``h[t] = decay (v[t-1] - rest) + rest + gain x[t] + bias`` and ``x[t] <= largest`` the
    membrane never exceeds ``max(start, rest + drive / (1 - decay))``, since spikes only lower it.
    What differs between channels enters by its least favourable value.

    Args:
        spec: the neuron's rule; True everywhere unless it is exact and has the form above.
        largest: upper bound of every input, float64.
    """
    known = (
        spec.exact
        and spec.kind != "integrator"
        and _least(spec.decay) >= 0
        and _most(spec.decay) <= 1
        and _least(spec.gain) >= 0
        and _least(spec.threshold if spec.reset_amount is None else spec.reset_amount) >= 0
    )
    if not known:
        return torch.ones_like(largest, dtype=torch.bool)
    drive = _driven(spec, largest)
    drive = torch.maximum(_most(spec.gain) * drive, _least(spec.gain) * drive) + _most(spec.bias)
    rest, decay = _most(spec.rest), _most(spec.decay)
    start = _most(spec.initial)
    if spec.reset == "hard":
        start = max(start, _most(spec.reset_value))
    if spec.floor is not None:
        start = max(start, spec.floor)
    settled = rest + (drive / (1 - decay) if decay < 1 else drive * torch.inf)
    # below rest the membrane rises towards it; a negative drive keeps it at rest + drive at most
    settled = torch.where(drive > 0, settled, rest + drive.clamp(max=0))
    bound = torch.maximum(settled, torch.full_like(settled, start))
    reached = torch.maximum(decay * (bound - rest), torch.zeros_like(bound)) + rest + drive
    threshold = _least(spec.threshold)
    return reached >= threshold - _MARGIN * (1 + abs(threshold))


def _driven(spec: NeuronSpec, largest: Tensor) -> Tensor:
    """Upper bound of what the synapse hands to the membrane."""
    synapse = spec.synapse
    if synapse is None:
        return largest
    decay, gain = _most(synapse.decay), _most(synapse.gain)
    usable = _least(synapse.decay) >= 0 and decay < 1 and _least(synapse.gain) >= 0
    if not usable:
        return torch.full_like(largest, torch.inf)
    current = (gain * largest / (1 - decay)).clamp(min=0)
    return current if synapse.drives == "new" else current + largest.clamp(min=0)


def _least(value: Scalar) -> float:
    return float(value.min()) if isinstance(value, Tensor) else float(value)


def _most(value: Scalar) -> float:
    return float(value.max()) if isinstance(value, Tensor) else float(value)
