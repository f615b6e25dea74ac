# SPDX-License-Identifier: Apache-2.0
"""From the copy of a model to an engine: packed layers, folded norms, fused neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spikenm_fx import surgery
from spikenm_fx.errors import PackError, TraceError
from spikenm_fx.pack.engine.choose import LayerDraft
from spikenm_fx.pack.engine.fused import fuse_neuron, why_not_fused
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.norms import (
    FoldedNorm,
    affine_of,
    neurons_behind_pools,
    norms_behind_layers,
)
from spikenm_fx.pack.kernels.reference import dense_layer
from spikenm_fx.pack.summary import PackedLayerReport, PackReport
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight
from spikenm_fx.pattern import NM, is_weight_layer, tightest, torch_class
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["EngineBuilder"]

# What weights are tested for.
PATTERNS = tuple(
    NM.parse(p) for p in ("1:16", "1:8", "2:16", "1:4", "2:8", "4:16", "1:2", "2:4", "4:8")
)
DENSE = NM(1, 1)


class EngineBuilder:
    """Turns a copy of a model into an engine, step by step.

    Args:
        engine: the copy, in eval mode; it is changed in place.
        args: the example inputs; None where there are none.
        dtype: of the stored values; None keeps fp32.
        nm: what each layer must be that is not entirely dense; None for whatever it is.

    Raises:
        PackError: if the model does not run on the examples.
    """

    def __init__(
        self,
        engine: nn.Module,
        args: tuple[Any, ...] | None,
        dtype: torch.dtype | None,
        nm: NM | None,
    ) -> None:
        self.engine, self.args, self.dtype, self.nm = engine, args, dtype, nm
        self.layers: dict[str, LayerDraft] = {}
        self.skipped: dict[str, tuple[tuple[int, ...], str]] = {}
        self.graph: SpikingGraph | None = None
        if args is not None:
            try:
                self.graph = trace(engine, args)
            except TraceError as error:
                raise PackError(f"the model does not run on the examples: {error}") from error

    def replace_layers(self) -> None:
        """Put a packed layer in the place of every Linear, Conv1d and Conv2d.

        Raises:
            PackError: for a weight that is not finite, or not what it must be.
        """
        folded = self._foldable()
        for name, layer in list(self.engine.named_modules()):
            if not is_weight_layer(layer):
                continue
            reason = self._why_kept(layer, name)
            if reason:
                self.skipped[name] = (tuple(layer.weight.shape), reason)
                continue
            packed = self._pack(layer, name, folded.get(name))
            packed.stand_for(layer)
            weight: Any = layer.weight
            self.layers[name] = LayerDraft(packed, weight.numel() * 4)
            _replace(self.engine, name, layer, packed)

    def _why_kept(self, layer: nn.Module, name: str) -> str:
        record = self.graph.layers.get(name) if self.graph is not None else None
        if record is not None and record.inside:
            return f"lies inside {record.inside}"
        if parametrize.is_parametrized(layer):
            return "its weight is computed by a parametrization"
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            return f"a {type(layer).__name__} has no packed form"
        if layer.weight.dtype != torch.float32:
            return f"its weight is {layer.weight.dtype}, kernels compute in float32"
        if "forward" in vars(layer):
            return "its forward was replaced on the instance"
        try:
            LayerGeometry.of_layer(layer, name=name)
        except PackError as error:
            return str(error)
        if not _plain_forward(layer):
            return f"{type(layer).__name__} has a forward of its own, which computes something else"
        return surgery.why_not_extended(layer, PackedLayer, leading=True)

    def _pack(self, layer: Any, name: str, affine: tuple[Tensor, Tensor] | None) -> PackedLayer:
        weight, bias = layer.weight.detach(), layer.bias
        bias = None if bias is None else bias.detach()
        if affine is not None:
            factor, shift = affine
            weight = weight * factor.view(-1, *[1] * (weight.dim() - 1))
            bias = shift if bias is None else bias * factor + shift
        packed = self._packed_weight(weight, name, LayerGeometry.of_layer(layer, name=name))
        return PackedLayer(packed, bias, name=name)

    def _packed_weight(self, weight: Tensor, name: str, geometry: LayerGeometry) -> PackedWeight:
        pattern = tightest(weight, PATTERNS, remainder=True) or DENSE
        if self.nm is not None and pattern != DENSE:
            pattern = self.nm
        return pack_weight(weight, pattern, geometry=geometry, dtype=self.dtype, name=name)

    def _foldable(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Norms right behind a layer, as factor and shift per output channel; they are removed."""
        found = {}
        pairs = norms_behind_layers(self.graph) if self.graph is not None else {}
        for layer_name, norm_name in pairs.items():
            norm, layer = self._module(norm_name), self._module(layer_name)
            if norm is None or layer is None or self._why_kept(layer, layer_name):
                continue
            if _hooked(norm) or _hooked(layer):  # they see what is between the two
                continue
            affine = affine_of(norm, layer)
            if affine is not None:
                found[layer_name] = affine
                _replace(self.engine, norm_name, norm, FoldedNorm(norm).eval())
        return found

    def _module(self, name: str) -> nn.Module | None:
        try:
            return self.engine.get_submodule(name)
        except AttributeError:
            return None

    def fuse(self) -> None:
        """Let neurons run natively, and layers that drive one neuron alone wait for it."""
        assert self.graph is not None
        chains = {chain.neuron: chain for chain in self.graph.chains}
        drivers = {neuron: chain.layer for neuron, chain in chains.items()}
        drivers |= {n: layer for layer, n in neurons_behind_pools(self.graph).items()}
        for name, record in self.graph.neurons.items():
            module, chain, spec = self._module(name), chains.get(name), record.spec
            if record.functional or module is None:
                continue
            reason = why_not_fused(module, spec, state_read=chain is None or chain.state_read)
            layer = self.layers.get(drivers.get(name, ""))
            if not reason:
                fuse_neuron(module, spec)
                if layer is not None:
                    layer.packed.waits = True
                    layer.neuron = name
            elif layer is not None:
                layer.note = f"{name} is not fused: {reason}"

    def report(self) -> PackReport:
        """What became of each layer, in the order of the module tree."""
        rows = [
            PackedLayerReport(
                name,
                layer.packed.weight_shape,
                str(layer.packed.nm),
                layer.packed.choice,
                layer.rate,
                layer.milliseconds,
                layer.neuron,
                layer.note,
                layer.dense_bytes,
                layer.packed.packed.nbytes,
                layer.packed.resident_bytes,
                layer.planes,
            )
            for name, layer in self.layers.items()
        ]
        rows += [
            PackedLayerReport(name, shape, note=reason)
            for name, (shape, reason) in self.skipped.items()
        ]
        return PackReport(tuple(rows))


def _plain_forward(layer: Any) -> bool:
    """Whether the layer computes what torch's own computes, time axes aside."""
    cls, base = type(layer), torch_class(layer)
    inherited = (
        getattr(cls, n, None) is getattr(base, n, None) for n in ("forward", "_conv_forward")
    )
    if all(inherited):
        return True
    return cls.__module__.startswith("spikingjelly.") and _agrees(layer)


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


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _replace(root: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands: a module may be registered under several names."""
    for parent in root.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
