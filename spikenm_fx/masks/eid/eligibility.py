# SPDX-License-Identifier: Apache-2.0
"""Credit of every synapse: presynaptic trace times surrogate slope, summed over time.

For a synapse from input j to neuron i with the potential h = decay * v + gain * x (e-prop, Bellec
et al. 2020; OTTT, arXiv 2210.04195, for the trace of the input):

    E_ij = mean over the batch of  sum_t psi_i[t] * trace_j[t]
    trace_j[t] = decay * trace_j[t-1] + gain * x_j[t],   psi_i[t] = surrogate'(h_i[t] - threshold)

The leak is linear, so it may as well run backwards over the slopes:

    E_ij = mean over the batch of  sum_t filtered_i[t] * x_j[t]
    filtered_i[t] = gain * a_i[t],   a_i[t] = psi_i[t] + decay * a_i[t+1]

which filters one number per neuron instead of one per input, allows a leak per channel, and makes
E the weight gradient of the layer for the output gradient ``filtered``: one matrix product, or one
weight-gradient convolution over the merged time and batch.  A synaptic filter is part of the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikenm_fx._torch import ConvNd, ConvTransposeNd
from spikenm_fx.trace import NeuronSpec, membranes

__all__ = ["correlate", "filtered_slopes", "has_known_slope", "presynaptic_rate"]


def has_known_slope(spec: NeuronSpec) -> bool:
    """Whether :func:`filtered_slopes` can work from the spec alone."""
    known = spec.exact and spec.output == "spike" and spec.kind != "integrator"
    known = known and spec.floor is None  # what was raised to it has no slope
    return known and spec.surrogate is not None and callable(spec.surrogate.function)


def filtered_slopes(spec: NeuronSpec, inputs: Tensor) -> Tensor:
    """The slopes psi, filtered backwards in time by the neuron's leak and synapse.

    Args:
        spec: for which :func:`has_known_slope`.
        inputs: ``[T, B, *]`` what the neuron received, from its initial state on.

    Returns:
        ``[T, B, *]``, at least float32.

    Raises:
        TypeError, ValueError, RuntimeError: if the surrogate is not a differentiable function of
            ``h - threshold``.
    """
    if inputs.dtype in (torch.float16, torch.bfloat16):
        inputs = inputs.float()
    with torch.no_grad():
        distance = membranes(spec, inputs) - spec.threshold
    return _backwards(spec, _slopes(spec, distance))


def _slopes(spec: NeuronSpec, distance: Tensor) -> Tensor:
    assert spec.surrogate is not None
    fire = cast("Callable[[Tensor], Tensor]", spec.surrogate.function)
    with torch.enable_grad():
        distance = distance.detach().requires_grad_()
        spikes = fire(distance)
        (slopes,) = torch.autograd.grad(spikes.sum(), distance)
    return slopes


@torch.no_grad()
def _backwards(spec: NeuronSpec, slopes: Tensor) -> Tensor:
    out = torch.empty_like(slopes)
    membrane = torch.zeros_like(slopes[0])  # a[t+1]
    current = torch.zeros_like(slopes[0])  # the same for the synaptic current
    synapse = spec.synapse
    for t in range(len(slopes) - 1, -1, -1):
        later, membrane = membrane, slopes[t] + spec.decay * membrane
        if synapse is None:
            out[t] = spec.gain * membrane
        elif synapse.drives == "new":
            current = spec.gain * membrane + synapse.decay * current
            out[t] = synapse.gain * current
        else:
            current = spec.gain * later + synapse.decay * current
            out[t] = spec.gain * membrane + synapse.gain * current
    return out


@torch.no_grad()
def correlate(layer: nn.Module, inputs: Tensor, slopes: Tensor) -> Tensor:
    """Sum over positions of slopes times inputs, for each synapse: the layer's weight gradient.

    Args:
        layer: a Linear or Conv of any kind.
        inputs: what one call of it received; leading axes (time, batch) in any number.
        slopes: of the shape of what it returned.

    Returns:
        a tensor of the weight's shape, at least float32.
    """
    dtype = torch.promote_types(slopes.dtype, torch.float32)
    inputs, slopes = inputs.detach().to(dtype), slopes.detach().to(dtype)
    with torch.autocast(inputs.device.type, enabled=False):
        if not isinstance(layer, ConvNd):
            return slopes.reshape(-1, slopes.shape[-1]).T @ inputs.reshape(-1, inputs.shape[-1])
        return _conv_weight(layer, inputs, slopes)


def _conv_weight(layer: ConvNd, inputs: Tensor, slopes: Tensor) -> Tensor:
    inputs, slopes = _merged(layer, inputs), _merged(layer, slopes)
    padding: Any = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.kernel_size)
    found = torch.ops.aten.convolution_backward(
        slopes,
        inputs,
        # only its shape is looked at
        inputs.new_empty(1).expand(layer._parameters["weight"].shape),  # type: ignore[union-attr]
        None,
        layer.stride,
        padding,
        layer.dilation,
        isinstance(layer, ConvTransposeNd),
        layer.output_padding,
        layer.groups,
        (False, True, False),
    )
    return cast("Tensor", found[1])


def _merged(layer: ConvNd, value: Tensor) -> Tensor:
    """``(*, C, *space)`` to ``(N, C, *space)``."""
    return value.reshape(-1, *value.shape[-len(layer.kernel_size) - 1 :])


@torch.no_grad()
def presynaptic_rate(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Mean square of each input channel (of spikes: the firing rate), shaped to fit the weight.

    Args:
        layer: a Linear or Conv of any kind.
        inputs: what one call of it received.
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    inputs = inputs.detach().to(dtype)
    if not isinstance(layer, ConvNd):
        return inputs.reshape(-1, inputs.shape[-1]).square().mean(0)
    space = len(layer.kernel_size)
    rate = _merged(layer, inputs).square().mean((0, *range(2, space + 2)))
    ones = (1,) * space
    if isinstance(layer, ConvTransposeNd):
        return rate.view(-1, 1, *ones)
    per_group = rate.view(layer.groups, -1)  # output o of group g sees the channels of g
    outputs = layer.out_channels // layer.groups
    return per_group.repeat_interleave(outputs, 0).view(layer.out_channels, -1, *ones)
