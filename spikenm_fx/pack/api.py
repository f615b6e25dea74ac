# SPDX-License-Identifier: Apache-2.0
"""The verb ``pack``: an inference copy of a model on packed weights and fused neurons."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from spikenm_fx.errors import PackError, TraceError
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.pack.engine.choose import LayerDraft, choose
from spikenm_fx.pack.engine.fused import fuse_neuron, why_not_fused
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.engine.norms import (
    FoldedNorm,
    affine_of,
    neurons_behind_pools,
    norms_behind_layers,
)
from spikenm_fx.pack.summary import LayerReport, PackReport
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight
from spikenm_fx.pattern import NM, BlockView, PatternLike, is_weight_layer
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["pack", "packing"]

# What weights are tested for, sparsest first; a pattern before its coarser equivalents.
PATTERNS = tuple(
    NM.parse(p) for p in ("1:16", "1:8", "2:16", "1:4", "2:8", "4:16", "1:2", "2:4", "4:8")
)
DENSE = NM(1, 1)


def pack(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    backend: str | Mapping[str, str] = "auto",
    dtype: torch.dtype | None = None,
    nm: PatternLike | None = None,
) -> nn.Module:
    """An inference copy of ``model`` that runs on packed weights.

    Layers become :class:`~spikenm_fx.pack.engine.layer.PackedLayer`; where a layer drives one
    neuron alone, its batch norm is folded in and layer and neuron run as one kernel over all time
    steps, handing spikes on as bits.  The copy has the class, the call signature and the reset
    protocol of the model, which is left as it is.

    The engine itself cannot be pickled where its neurons are fused (``torch.save(engine)`` fails).
    Store the weights: :func:`~spikenm_fx.pack.weights.files.save_packed` with the ``packed`` of
    each packed layer, or the state dict, which loads into an engine packed alike.

    Args:
        model: on the CPU, folded (see :func:`spikenm_fx.fold`).
        example_inputs: a tensor or a tuple of arguments; needed to fuse and to measure.  Spikes of
            typical inputs make the measured choice right for typical inputs.
        backend: ``"auto"`` times every candidate of each layer on the examples and keeps the
            fastest, dense torch being one of them; ``"dense"``, ``"reference"``, ``"fma"``,
            ``"lut"``, ``"event"`` or ``"event8"`` force one wherever it is possible; a mapping
            from layer names (``report.choices``) forces each layer's.
        dtype: stored values: None keeps fp32; ``torch.int8``, ``float16`` and ``bfloat16`` round.
        nm: refuse layers that the model sparsified to another pattern: each layer that is not
            entirely dense must be ``nm``.

    Returns:
        The copy, in eval mode; :func:`packing` gives its report.

    Raises:
        PackError: for weights that are not finite or not ``nm``, masks that are not folded, a
            model on another device or packed already, or a backend that does not exist.
    """
    _refuse(model)
    engine = _copy(model)
    args = _arguments(example_inputs)
    builder = _Builder(engine, args, dtype, None if nm is None else NM.parse(nm))
    builder.replace_layers()
    if args is not None:
        builder.fuse()
    choose(engine, args, builder.layers, backend)
    engine.__dict__["_spikenm_packing"] = builder.report()
    if any(layer.packed.waits for layer in builder.layers.values()):  # else nothing is lazy
        engine.register_forward_hook(_plain_outputs)
    return engine


def packing(engine: nn.Module) -> PackReport:
    """The report of an engine that :func:`pack` made.

    Raises:
        PackError: for any other module.
    """
    report = engine.__dict__.get("_spikenm_packing")
    if not isinstance(report, PackReport):
        raise PackError(f"this {type(engine).__name__} was not made by pack()")
    return report


def _refuse(model: nn.Module) -> None:
    masked = [name for name, _, _ in masked_weights(model)]
    if masked:
        raise PackError(
            f"{masked[0]} and {len(masked) - 1} more layers still carry their masks; "
            "call spikenm_fx.fold(model) first"
        )
    packed = next((n for n, m in model.named_modules() if isinstance(m, PackedLayer)), None)
    if packed is not None:
        raise PackError(f"{packed} is packed already; pack the model that this engine was made of")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise PackError(f"{name} is on {parameter.device}; move the model to the CPU first")


def _plain_outputs(_engine: nn.Module, _args: Any, output: Any) -> Any:
    """What leaves the engine is ordinary tensors."""
    if type(output) is Tensor or torch.compiler.is_compiling():
        return output
    return tree_map(lambda x: x.materialize() if isinstance(x, LazyTensor) else x, output)


def _copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        raise PackError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pack "
            "works on a copy.deepcopy of the model"
        ) from error
    _register(model, copied)
    return copied


def _register(model: nn.Module, copied: nn.Module) -> None:
    """Enter copies where their originals are listed: snnTorch resets the neurons of such a list."""
    for original, twin in zip(model.modules(), copied.modules(), strict=True):
        listed = getattr(type(original), "instances", None)
        if isinstance(listed, list) and any(entry is original for entry in listed):
            listed.append(twin)


def _arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


class _Builder:
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
        """Put a packed layer in the place of every Linear, Conv1d and Conv2d."""
        folded = self._foldable()
        for name, layer in list(self.engine.named_modules()):
            if not is_weight_layer(layer):
                continue
            reason = self._why_kept(layer, name)
            if reason:
                self.skipped[name] = (tuple(layer.weight.shape), reason)
                continue
            packed = self._pack(layer, name, folded.get(name))
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
        if not _plain_forward(layer):
            return f"{type(layer).__name__} has a forward of its own"
        try:
            LayerGeometry.of_layer(layer, name=name)
        except PackError as error:
            return str(error)
        return ""

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
        pattern = _pattern_of(weight)
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
        rows = [
            LayerReport(
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
            LayerReport(name, shape, note=reason) for name, (shape, reason) in self.skipped.items()
        ]
        return PackReport(tuple(rows))


def _plain_forward(layer: nn.Module) -> bool:
    """Whether its class computes what torch's own computes, time axes aside."""
    cls = type(layer)
    if cls.__module__.startswith(("torch.nn.", "spikingjelly.")):
        return True
    base: Any = next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn."))
    own: Any = cls
    return own.forward is base.forward


def _pattern_of(weight: Tensor) -> NM:
    """The sparsest common pattern that ``weight`` satisfies, else 1:1."""
    for nm in PATTERNS:
        if weight.shape[1] < nm.of:
            continue
        if all(_satisfies(rows, nm) for rows in weight.split(_rows_at_once(weight))):
            return nm
    return DENSE


def _satisfies(weight: Tensor, nm: NM) -> bool:
    blocks = BlockView(nm, tuple(weight.shape)).to_blocks(weight)
    return not bool(((blocks != 0).sum(1) > nm.keep).any())


def _rows_at_once(weight: Tensor) -> int:
    return max(1, 2**22 // max(1, weight[0].numel()))


def _replace(root: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands: a module may be registered under several names."""
    for parent in root.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
