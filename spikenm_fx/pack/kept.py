# SPDX-License-Identifier: Apache-2.0
"""Why a layer stays torch's or a neuron keeps its own forward, and what its user can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from spikenm_fx import surgery
from spikenm_fx.errors import PackError
from spikenm_fx.pack.engine.fused import why_not_fused
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.products import PackedProducts
from spikenm_fx.pack.kernels.reference import dense_layer
from spikenm_fx.pack.weights.format import LayerGeometry
from spikenm_fx.pattern import torch_class
from spikenm_fx.trace.graph import LayerRecord, NeuronRecord

__all__ = ["computes_torchs", "hooked", "why_layer_kept", "why_neuron_kept"]

_SHARED = ("forward", "weight", "bias", "name", "train", "extra_repr")
"""Names that a packed layer and the user's class may both have."""


def why_layer_kept(layer: nn.Module, record: LayerRecord | None) -> str:
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
    clash = _clash(layer)
    if clash:
        return (
            f"Its class {cls} has a {clash!r} of its own, a name that packed layers use; rename it "
            "to pack the layer."
        )
    reason = surgery.why_not_extended(layer, PackedLayer, leading=True)
    return f"It stays torch's: {reason}; derive it from nn.Module to pack it." if reason else ""


def _clash(layer: nn.Module) -> str:
    """A name that both the user's class and packed layers give a meaning."""
    taken = {*vars(PackedLayer), *vars(PackedProducts), "values", "indices", "nm", "meter", "waits"}
    taken |= {"choice", "geometry", "scale", "weight_shape"}
    taken = {n for n in taken if not n.startswith("__") and n not in _SHARED}
    return next((n for n in sorted(taken) if hasattr(layer, n) and not hasattr(nn.Module, n)), "")


def why_neuron_kept(module: nn.Module | None, record: NeuronRecord, *, state_read: bool) -> str:
    """Why a neuron keeps its own forward, as a sentence with a way out; "" if it is fused."""
    if record.functional or module is None:
        return (
            "It is code in a forward, not a module, and runs as it is; put it into a module that "
            "spikenm_fx.trace knows, or describe that with register_neuron, to fuse it."
        )
    reason = why_not_fused(module, record.spec, state_read=state_read)
    if hooked(module) or "forward" in vars(module):
        reason = "hooks or a forward set on the instance see what it takes and gives"
    if not reason:
        return ""
    return f"It keeps its own forward: {reason}; {_way_out(reason)}."


def _way_out(reason: str) -> str:
    for part, advice in (
        ("not fully known", "describe it with spikenm_fx.trace.register_neuron(cls, read=...)"),
        ("not spikes", "nothing is to be done where this is the readout"),
        ("hard reset", "use reset_mechanism='subtract' or reset_delay=True"),
        ("first axis", "give it its input time first, [T, N, ...]"),
        ("reads the state", "let the model ignore the returned state"),
        ("carries its state", "let the neuron keep its state (init_hidden, step_mode='m')"),
        ("synaptic current", "use the form that takes all time steps in one call"),
        ("where it keeps", "name its state in the spec given to register_neuron"),
        ("hooks", "remove them from the model before packing"),
    ):
        if part in reason:
            return advice
    return "derive the neuron from nn.Module alone"


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
