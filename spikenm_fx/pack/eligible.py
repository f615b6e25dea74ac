# SPDX-License-Identifier: Apache-2.0
"""Which layers a packed weight can stand for, however they are run then."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from spikenm_fx import surgery
from spikenm_fx.errors import PackError
from spikenm_fx.pack.kernels.reference import dense_layer
from spikenm_fx.pack.weights.format import LayerGeometry
from spikenm_fx.pattern import torch_class
from spikenm_fx.trace.graph import LayerRecord

__all__ = ["computes_torchs", "hooked", "why_not_packable"]


def why_not_packable(layer: nn.Module, record: LayerRecord | None) -> str:
    """Why this layer has no packed form, as a sentence with a way out; "" if it has one."""
    cls = surgery.plain_class(layer).__name__
    if record is not None and record.inside:
        return (
            f"It lies inside the neuron {record.inside}, which runs as a whole; move it in front "
            "of the neuron to pack it."
        )
    if parametrize.is_parametrized(layer):
        return (
            "Its weight is computed by a parametrization; bake it in with "
            "torch.nn.utils.parametrize.remove_parametrizations before packing."
        )
    if not isinstance(layer.__dict__["_parameters"].get("weight"), nn.Parameter):
        return (
            "Its weight is computed before each call (weight_norm, spectral_norm); bake it in with "
            "torch.nn.utils.remove_weight_norm or remove_spectral_norm before packing."
        )
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return (
            f"A {cls} has no packed form; only Linear, Conv1d and Conv2d have, so write it as one "
            "of them where speed matters."
        )
    if layer.weight.dtype != torch.float32:
        return (
            f"Its weight is {layer.weight.dtype}, and kernels compute in float32; call "
            "model.float() before packing."
        )
    try:
        LayerGeometry.of_layer(layer, name="it")
    except PackError as error:
        return f"It has no packed form ({error}); use padding_mode='zeros', padding beforehand."
    return ""


def hooked(module: nn.Module) -> bool:
    """Whether somebody sees, or changes, what goes into the module or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def computes_torchs(layer: Any) -> bool:
    """Whether the layer computes what torch's own computes, time axes aside."""
    if "forward" in vars(layer) or "_conv_forward" in vars(layer):
        return False
    cls, base = surgery.plain_class(layer), torch_class(layer)
    own = [
        made
        for n in ("forward", "_conv_forward", "__call__")
        if (made := getattr(cls, n, None)) is not getattr(base, n, None)
    ]
    foreign = [made for made in own if not made.__module__.startswith("spikingjelly.")]
    return not own or (not foreign and _agrees(layer))


def _agrees(layer: Any) -> bool:
    """Whether a forward that handles time gives what torch's gives: some do more than that."""
    geometry = LayerGeometry.of_layer(layer)
    sizes = [
        d * (k - 1) + 2 for d, k in zip(geometry.dilation, layer.weight.shape[2:], strict=True)
    ]
    channels = layer.weight.shape[1] * geometry.groups
    probe = torch.randn(2, channels, *sizes, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense_layer(probe, layer.weight, layer.bias, geometry)
        try:
            multi = getattr(layer, "step_mode", "s") == "m"
            seen = layer.forward(probe[None])[0] if multi else layer.forward(probe)
        except Exception:  # whatever a foreign forward dislikes, it is not packed
            return False
    if seen.shape != expected.shape:
        return False
    return torch.allclose(seen, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
