# SPDX-License-Identifier: Apache-2.0
"""From the copy of a model to an engine: packed layers, folded norms, fused neurons."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx import surgery
from spikenm_fx.errors import PackError, TraceError
from spikenm_fx.pack.eligible import computes_torchs, hooked
from spikenm_fx.pack.engine.choose import LayerDraft
from spikenm_fx.pack.engine.fused import fuse_neuron, release_neuron
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.norms import (
    FoldedNorm,
    affine_of,
    neurons_behind_pools,
    norms_behind_layers,
)
from spikenm_fx.pack.engine.products import PackedProducts
from spikenm_fx.pack.kept import why_layer_kept, why_neuron_kept
from spikenm_fx.pack.summary import PackedLayerReport, PackedNeuronReport, PackReport
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight, unpack_weight
from spikenm_fx.pack.weights.tightest import DENSE, tightest_pattern
from spikenm_fx.pattern import NM, is_weight_layer
from spikenm_fx.state import as_given, preserved
from spikenm_fx.trace import LayerRecord, NeuronSpec, SpikingGraph, trace

__all__ = ["EngineBuilder"]

UNMULTIPLIED = (
    "{cls} has a forward of its own, which computes something else than a product with its weight: "
    "no F.linear or F.conv on the weight itself, with the layer's bias, stride and padding, was "
    "seen in it; write it so, with what else it does before or after, to pack it."
)
APART = (
    "It runs apart from any neuron, as what it gives goes elsewhere too, or through more operations"
    " first. Nothing is to be done; to fuse a neuron, let it take this layer's output alone."
)
ALONE = (
    "It runs natively, but by itself, as no packed layer drives it alone. Nothing is to be done; to"
    " run it inside a layer's kernel, let the model chain that layer, its norm and it."
)


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
        self.small = False  # layers keep nothing but their packed weights
        self.layers: dict[str, LayerDraft] = {}
        self.skipped: dict[str, tuple[tuple[int, ...], str]] = {}
        self.left: dict[str, PackedLayerReport] = {}  # could be packed, and would gain nothing
        self.neurons: dict[str, str] = {}
        self.fused: dict[str, NeuronSpec] = {}
        self.graph: SpikingGraph | None = None
        if args is not None:
            try:
                self.graph = trace(engine, args)
            except TraceError as error:
                raise PackError(f"the model does not run on the examples: {error}") from error

    def replace_layers(self) -> None:
        """Make a packed layer of every Linear, Conv1d and Conv2d that can be one.

        Raises:
            PackError: for a weight that is not finite, or not what it must be.
        """
        folded = self._foldable()
        for name, layer in list(self.engine.named_modules()):
            if not is_weight_layer(layer):
                continue
            shape = tuple(layer.weight.shape)
            reason = why_layer_kept(layer, self._record(name))
            if reason:
                self.skipped[name] = (shape, reason)
                continue
            affine, norm = folded.get(name, (None, None))
            before = type(layer), vars(layer)
            packed = self._pack(layer, name, affine)
            if computes_torchs(layer) and not self._used_elsewhere(name):
                packed = packed.stand_for(layer)
            else:
                packed = PackedProducts.of(packed, layer)
            self.layers[name] = LayerDraft(packed, math.prod(shape) * 4, before=before, norm=norm)

    def round_alike(self, reference: nn.Module) -> None:
        """Give a copy of the model the weights that are stored here, norms multiplied in.

        Args:
            reference: the copy, changed in place.
        """
        for name, draft in self.layers.items():
            layer, packed = reference.get_submodule(name), draft.packed
            rounded = {"weight": unpack_weight(packed.packed).float(), "bias": packed.bias}
            for key, value in rounded.items():
                if value is not None:
                    setattr(layer, key, nn.Parameter(value.clone(), requires_grad=False))
            if draft.norm is not None:
                _replace(reference, reference.get_submodule(draft.norm[0]), nn.Identity())

    def fixed_tensors(self) -> list[Tensor]:
        """What the packed layers hold and no forward writes into."""
        return [t for draft in self.layers.values() for t in draft.packed.fixed_tensors()]

    def _record(self, name: str) -> LayerRecord | None:
        return self.graph.layers.get(name) if self.graph is not None else None

    def _used_elsewhere(self, name: str) -> bool:
        """Whether somebody multiplies the weight without calling the layer."""
        return self.graph is not None and f"{name}.weight" in self.graph.layers

    def put_back_unmultiplied(self) -> None:
        """Put back layers with a forward of their own in which no product of theirs is seen."""
        assert self.args is not None
        layers = {n: d.packed for n, d in self.layers.items()}
        own = {n: p for n, p in layers.items() if isinstance(p, PackedProducts)}
        if not own:
            return
        seen: dict[str, list[Tensor]] = {name: [] for name in own}
        with torch.no_grad(), preserved(self.engine), contextlib.suppress(Exception):
            for name, layer in own.items():
                layer.watched = seen[name]
            self.engine(*as_given(self.args))
        for name, layer in own.items():
            if not seen[name]:
                self.put_back(name, UNMULTIPLIED.format(cls=surgery.plain_class(layer).__name__))

    def put_back(self, name: str, reason: str) -> None:
        """Let a layer be torch's again, with its norm and, if one is fused with it, its neuron.

        Args:
            name: of a packed layer.
            reason: a sentence for the report.
        """
        shape = self.layers[name].packed.weight_shape
        self._restore(name)
        self.skipped[name] = (shape, reason)

    def leave(self, name: str, reason: str) -> None:
        """Let a layer that can be packed be torch's again; the report keeps what was measured.

        Args:
            name: of a packed layer.
            reason: a sentence for the report.
        """
        row = self._row(name, self.layers[name])
        self._restore(name)
        self.left[name] = replace(
            row, choice="torch", neuron="", note=reason, resident_bytes=row.dense_bytes
        )

    def leave_everything(self, reason: str) -> None:
        """Let nothing but the model's own code run: no layer is packed, and no neuron fused.

        Args:
            reason: a sentence for the report.
        """
        for name in list(self.fused):
            self.unfuse(name, reason)
        for name in list(self.layers):
            self.leave(name, reason)

    def _restore(self, name: str) -> None:
        """A layer's own class and attributes, its norm, and its neuron's own forward."""
        draft = self.layers.pop(name)
        layer, (cls, attributes) = draft.packed, draft.before
        object.__setattr__(layer, "__dict__", attributes)
        surgery.give_class(layer, cls)
        if draft.norm is not None:
            norm_name, norm = draft.norm
            _replace(self.engine, self.engine.get_submodule(norm_name), norm)
        if draft.neuron:
            self.unfuse(draft.neuron, f"The layer that drives it, {name}, is torch's; see there.")

    def unfuse(self, name: str, reason: str) -> None:
        """Give a neuron its own forward back.

        Args:
            name: of a fused neuron.
            reason: a sentence for the report.
        """
        release_neuron(self.engine.get_submodule(name))
        self.neurons[name] = reason
        self.fused.pop(name, None)
        for draft in self.layers.values():
            if draft.neuron == name:
                draft.neuron, draft.packed.waits = "", False
                draft.note = f"Its neuron {name} is not fused with it. {reason}"
                draft.packed.choose(draft.packed.choice)

    def _pack(self, layer: Any, name: str, affine: tuple[Tensor, Tensor] | None) -> PackedLayer:
        weight, bias = layer.weight.detach(), layer.bias
        bias = None if bias is None else bias.detach()
        if affine is not None:
            factor, shift = affine
            weight = weight * factor.view(-1, *[1] * (weight.dim() - 1))
            bias = shift if bias is None else bias * factor + shift
        packed = self._packed_weight(weight, name, LayerGeometry.of_layer(layer, name=name))
        return PackedLayer(packed, bias, name=name, small=self.small)

    def _packed_weight(self, weight: Tensor, name: str, geometry: LayerGeometry) -> PackedWeight:
        pattern = tightest_pattern(weight)
        if self.nm is not None and pattern != DENSE:
            pattern = self.nm
        return pack_weight(weight, pattern, geometry=geometry, dtype=self.dtype, name=name)

    def _foldable(self) -> dict[str, tuple[tuple[Tensor, Tensor], tuple[str, nn.Module]]]:
        """Norms right behind a layer, as factor and shift per output channel; they are removed."""
        found = {}
        pairs = norms_behind_layers(self.graph) if self.graph is not None else {}
        for layer_name, norm_name in pairs.items():
            norm, layer = self._module(norm_name), self._module(layer_name)
            if norm is None or layer is None or why_layer_kept(layer, self._record(layer_name)):
                continue
            if hooked(norm) or hooked(layer) or not computes_torchs(layer):
                continue  # hooks see what is between the two
            affine = affine_of(norm, layer)
            if affine is not None:
                found[layer_name] = affine, (norm_name, norm)
                _replace(self.engine, norm, FoldedNorm(norm).eval())
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
            module, chain = self._module(name), chains.get(name)
            state_read = chain is None or chain.state_read
            reason = why_neuron_kept(module, record, state_read=state_read)
            self.neurons[name] = reason
            layer = self.layers.get(drivers.get(name, ""))
            if reason:
                if layer is not None:
                    layer.note = f"Its neuron {name} is not fused with it. {reason}"
                continue
            assert module is not None
            fuse_neuron(module, record.spec)
            self.fused[name] = record.spec
            if layer is None or isinstance(layer.packed, PackedProducts) or hooked(layer.packed):
                self.neurons[name] = ALONE
            else:
                layer.packed.waits = True
                layer.neuron = name

    def _why_apart(self, name: str, layer: LayerDraft) -> str:
        """Why a packed layer runs without a neuron, as a sentence; "" if it does not."""
        record = self._record(name)
        if layer.neuron or record is None:
            return ""
        if isinstance(layer.packed, PackedProducts):
            return "Packed inside its own forward, apart from any neuron. Nothing is to be done."
        if record.is_readout:
            return "It drives no neuron, as what it gives leaves the model. Nothing is to be done."
        if hooked(layer.packed):
            return "Its hooks see what it gives, so no neuron runs in it; remove them to fuse one."
        return APART

    def _row(self, name: str, layer: LayerDraft) -> PackedLayerReport:
        return PackedLayerReport(
            name,
            layer.packed.weight_shape,
            str(layer.packed.nm),
            layer.packed.choice,
            layer.rate,
            layer.milliseconds,
            layer.neuron,
            layer.note or self._why_apart(name, layer),
            layer.dense_bytes,
            layer.packed.packed.nbytes,
            layer.packed.resident_bytes,
            layer.planes,
        )

    def report(self) -> PackReport:
        """What became of each layer and neuron, in the order of the module tree."""
        rows = {name: self._row(name, layer) for name, layer in self.layers.items()} | self.left
        for name, (shape, reason) in self.skipped.items():
            rows[name] = PackedLayerReport(name, shape, note=reason)
        order = {name: place for place, (name, _) in enumerate(self.engine.named_modules())}
        fused = {layer.neuron: name for name, layer in self.layers.items() if layer.neuron}
        neurons = tuple(
            PackedNeuronReport(name, fused.get(name, ""), note)
            for name, note in self.neurons.items()
        )
        return PackReport(tuple(rows[n] for n in sorted(rows, key=order.__getitem__)), neurons)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands: a module may be registered under several names."""
    for parent in root.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
