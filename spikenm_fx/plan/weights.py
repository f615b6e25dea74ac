# SPDX-License-Identifier: Apache-2.0
"""The weights of a model: of its Linear and Conv modules, and raw parameters seen in products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from spikenm_fx._torch import ConvTransposeNd, is_scripted
from spikenm_fx.pattern import is_weight_layer, torch_class
from spikenm_fx.trace.graph import LayerRecord, SpikingGraph

__all__ = ["RAW", "Weight", "weights_of"]

RAW = "Parameter"
"""The kind of a weight that no Linear or Conv module holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One weight of a model.

    Attributes:
        name: qualified name: of the layer, or of the parameter where there is no layer.
        kind: the torch class of the layer; :data:`RAW` for a parameter.
        holder: the module that holds the parameter.
        key: under which it does.
        axis: the weight's axis of input channels.
        groups: the groups that share axis 0 (transposed convolutions).
        impossible: why it can never be N:M; empty where it can.
    """

    name: str
    kind: str
    holder: nn.Module
    key: str
    axis: int
    groups: int
    impossible: str

    @property
    def subject(self) -> nn.Module | Tensor | None:
        """What a rule's class means: the layer, or the parameter itself."""
        return self.parameter if self.kind == RAW else self.holder

    @property
    def parameter(self) -> Tensor | None:
        """The parameter; None for a weight that is computed."""
        return self.holder._parameters.get(self.key)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; empty where the layer has none yet, or computes it."""
        # a computed weight is not asked for: computing may change buffers (spectral_norm)
        weight = self.holder._parameters.get(self.key, self.holder.__dict__.get(self.key))
        if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter):
            return ()
        return tuple(weight.shape)


def weights_of(model: nn.Module, graph: SpikingGraph | None) -> dict[str, Weight]:
    """Every weight, by name: layers in module order, then parameters in order of their use."""
    found = [
        _of_layer(name, module, graph)
        for name, module in nn.Module.named_modules(model)
        if is_weight_layer(module)
    ]
    modules = dict(nn.Module.named_modules(model))
    return {weight.name: weight for weight in (*found, *_raw(modules, graph))}


def _of_layer(name: str, layer: nn.Module, graph: SpikingGraph | None) -> Weight:
    groups = layer.groups if isinstance(layer, ConvTransposeNd) else 1
    kind, axis = torch_class(layer).__name__, _axis(layer)
    impossible = _impossible(layer)
    alone = _used_by_itself(name, graph)
    if alone is not None and not impossible:
        axis, groups = (alone.axis, alone.groups) if alone.axis is not None else (axis, groups)
        impossible = alone.undecided
    record = graph.record(name) if graph is not None else None
    if record is not None and not impossible:
        impossible = record.undecided
    return Weight(name, kind, layer, "weight", axis, groups, impossible)


def _used_by_itself(name: str, graph: SpikingGraph | None) -> LayerRecord | None:
    """The use of a layer's weight, where the layer itself is never called."""
    record = graph.record(name) if graph is not None else None
    return record if record is not None and record.name != name else None


def _axis(layer: nn.Module) -> int:
    """The weight's axis of input channels."""
    return 0 if isinstance(layer, ConvTransposeNd) else 1


def _raw(modules: dict[str, nn.Module], graph: SpikingGraph | None) -> Iterator[Weight]:
    for name, record in graph.layers.items() if graph is not None else ():
        owner, _, key = name.rpartition(".")
        holder = modules.get(owner)
        if record.kind != "functional" or holder is None or is_scripted(holder):
            continue  # scripted ones are listed by their modules
        listed = key == "weight" and is_weight_layer(holder)
        if listed and (record.axis == _axis(holder) or _used_by_itself(owner, graph)):
            continue  # its layer is listed, and masked as this use needs it
        axis = 1 if record.axis is None else record.axis
        if key not in holder._parameters:
            impossible = "not registered in any module of the model"
        else:
            raw = cast("Tensor", holder._parameters[key])
            impossible = _unmaskable(raw) or _unfit(record, holder)
        yield Weight(name, RAW, holder, key, axis, record.groups, impossible)


def _unfit(record: LayerRecord, holder: nn.Module) -> str:
    """Why a raw parameter cannot be masked; empty where it can."""
    if record.axis is None:
        return record.undecided or "the axis that it is summed along was not seen"
    if is_weight_layer(holder):
        return f"used by itself, beside the {type(holder).__name__} that holds it"
    if type(holder).__module__.startswith("torch.nn."):
        kind = type(holder).__name__
        if kind not in ("ParameterList", "ParameterDict"):
            return f"it is also the weight of a {kind}, which would change with it"
    return ""


def _impossible(layer: nn.Module) -> str:
    """Why a layer's weight cannot be masked; empty where it can."""
    weight = layer._parameters.get("weight")
    if weight is not None:
        return _unmaskable(weight)
    if "weight_g" in layer._parameters:
        way = "torch.nn.utils.remove_weight_norm(layer)"
        return f"its weight is computed (weight_norm) from weight_v and weight_g: {way} first"
    if "parametrizations" in layer._modules:
        way = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        return f"its weight is computed (weight_norm or another parametrization): {way} first"
    return "its weight is computed (spectral_norm or the like), not a parameter"


def _unmaskable(weight: Tensor | None) -> str:
    if weight is None:
        return "its weight is computed, not a parameter"
    if isinstance(weight, UninitializedParameter):
        return "lazy: run one forward pass before planning"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    return "its weight is empty" if weight.numel() == 0 else ""
