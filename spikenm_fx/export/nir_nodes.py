# SPDX-License-Identifier: Apache-2.0
"""From the parts of a model to the nodes of a NIR graph that one reader reads as this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikenm_fx.errors import ExportError
from spikenm_fx.export.nir_neurons import NeuronNode, neuron_node
from spikenm_fx.export.nir_readers import Reader
from spikenm_fx.export.packages import needed
from spikenm_fx.export.parts import Part, StepGraph
from spikenm_fx.pack.engine.norms import affine_of
from spikenm_fx.pattern import NM

__all__ = ["Weights", "fold_norms", "nodes_for"]


@dataclass(slots=True, eq=False)
class Weights:
    """Weight and bias of a layer on their way into a node, float64 until they are written.

    Attributes:
        weight: of the layer's shape.
        bias: per output channel; None where there is none.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> Weights:
        """A copy of what a layer multiplies with."""
        held: Any = layer
        bias = held.bias
        return cls(
            held.weight.detach().cpu().double().clone(),
            None if bias is None else bias.detach().cpu().double().clone(),
        )

    def scale(self, factor: Any) -> None:
        """Multiply the outputs by a factor, of one number or one per output channel (shape [O])."""
        given = torch.as_tensor(factor, dtype=torch.float64).reshape(-1)
        if bool((given == 1.0).all()):
            return
        self.weight *= given.reshape(-1, *[1] * (self.weight.dim() - 1))
        if self.bias is not None:
            self.bias *= given

    def shift(self, offset: Tensor) -> None:
        """Add an offset, per output channel (shape [O])."""
        zero = torch.zeros(self.weight.shape[0], dtype=torch.float64)
        self.bias = (zero if self.bias is None else self.bias) + offset.double()


def fold_norms(steps: StepGraph) -> dict[str, Weights]:
    """The weights of all layers, each batch norm taken into the layer before it.

    Returns:
        The weights by the layer's name; the norms are gone from ``steps``.

    Raises:
        ExportError: for a norm that no layer can take in.
    """
    layers = [part for part in steps.parts.values() if part.kind == "layer"]
    weights = {part.name: Weights.of(_layer(part)) for part in layers}
    for part in [part for part in steps.parts.values() if part.kind == "norm"]:
        sources = steps.sources(part.name)
        source = steps.parts[sources[0]]
        alone = len(sources) == 1 and steps.targets(source.name) == [part.name]
        assert part.module is not None
        affine = None
        if alone and source.kind == "layer":
            affine = affine_of(part.module, source.module)
        if affine is None:
            raise ExportError(
                f"{part.name} ({type(part.module).__name__}) is no batch norm in float32 with "
                "running statistics directly behind one layer of its own, and NIR has no norms: "
                "train with such a norm, or without"
            )
        weights[source.name].scale(affine[0].double().numpy())
        weights[source.name].shift(affine[1])
        steps.bypass(part.name)
    return weights


def nodes_for(
    steps: StepGraph,
    weights: Mapping[str, Weights],
    reader: Reader,
    patterns: Mapping[str, NM],
) -> tuple[dict[str, Any], bool]:
    """The nodes by name, and whether nir's own type check understands them.

    Args:
        steps: the parts; norms folded.
        weights: of the layers; they are changed.
        reader: for whom.
        patterns: of the layers that are N:M, for their nodes' metadata.

    Raises:
        ExportError: for what NIR or the reader cannot say, by name.
    """
    nir = needed("nir", "export.nir")
    _move_recurrent_bias(steps, weights)
    neurons = {}
    for part in steps.parts.values():
        if part.kind == "neuron":
            neurons[part.name] = neuron_node(part, reader)
            _scale_before(steps, weights, part, neurons[part.name].factor, reader)
    for part in steps.parts.values():
        if part.kind == "pool":
            _settle_pool(steps, weights, part, reader)
    if not reader.recurrent and any(delay for _, _, delay in steps.edges):
        loop = next(t for _, t, delay in steps.edges if delay)
        raise ExportError(
            f"{loop} is recurrent, which {reader.name} does not read as what it is; use "
            "target='spikingjelly', 'norse' or 'file'"
        )
    nodes, checked = {}, reader.name != "sinabs"
    for name, part in steps.parts.items():
        if part.kind == "layer":
            node = _weight_node(nir, part, weights[name], reader, steps)
            node.metadata = _pattern_metadata(patterns.get(name), part)
            checked = checked and _understood(node)
        elif part.kind == "neuron":
            node = _neuron(nir, part, neurons[name], reader)
        else:
            node = _other(nir, part, steps)
        if type(node).__name__ not in (*reader.nodes, "Input", "Output"):
            raise ExportError(
                f"{name}: {reader.name} does not read NIR's {type(node).__name__}; see the table "
                "of readers in spikenm_fx.export.nir_readers"
            )
        nodes[name] = node
    return nodes, checked


def _layer(part: Part) -> nn.Module:
    module: Any = part.module
    kind = type(module).__name__
    assert module is not None
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        raise ExportError(
            f"{part.name} ({kind}) {tuple(module.weight.shape)}: NIR has Linear, Conv1d, Conv2d; "
            "put one of them in its place"
        )
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise ExportError(
            f"{part.name} ({kind}) pads by {module.padding_mode!r}; NIR pads by zeros only"
        )
    return module


def _move_recurrent_bias(steps: StepGraph, weights: Mapping[str, Weights]) -> None:
    """Readers leave the feedback out of the first step, its bias with it: it goes elsewhere."""
    for source, target, delay in steps.edges:
        bias = weights[source].bias if delay and source in weights else None
        if bias is None:
            continue
        if not bool(bias.any()):
            weights[source].bias = None
            continue
        beside = [
            s
            for s, t, d in steps.edges
            if t == target and not d and s in weights and steps.targets(s) == [target]
        ]
        if not beside:
            raise ExportError(
                f"{source} is recurrent and has a bias, which readers leave out of the first step; "
                "give it none (bias=False)"
            )
        weights[beside[0]].shift(bias)
        weights[source].bias = None


def _scale_before(
    steps: StepGraph, weights: Mapping[str, Weights], part: Part, factor: Any, reader: Reader
) -> None:
    """Multiply what drives a neuron, in the layers that drive it alone."""
    if bool((np.asarray(factor) == 1.0).all()):
        return
    for source in steps.sources(part.name):
        if source not in weights or steps.targets(source) != [part.name]:
            raise ExportError(
                f"{part.name}: {reader.name} does not read r, so that the gain of this neuron must "
                f"go into the weights before it, but {source} drives others too or is no layer"
            )
        weights[source].scale(_per_channel(part, factor))


def _per_channel(part: Part, factor: Any) -> Any:
    """One factor for each output channel of the layer before."""
    rows = np.broadcast_to(factor, part.shape).reshape(part.shape[0], -1)
    if bool((rows != rows[:, :1]).any()):
        raise ExportError(
            f"{part.name}: its gain differs within a channel, and no weight could take that in"
        )
    return np.ascontiguousarray(rows[:, 0])


def _settle_pool(
    steps: StepGraph, weights: Mapping[str, Weights], part: Part, reader: Reader
) -> None:
    """A mean is a sum, 1 / count in the weights behind it, for readers that know sums only."""
    kinds = {"avg": "AvgPool2d", "sum": "SumPool2d"}
    if kinds[part.options["op"]] in reader.nodes:
        if part.options["op"] == "sum" and any(part.options["padding"]):
            raise ExportError(f"{part.name}: sums over padded windows arrive in no reader")
        return
    other = "sum" if part.options["op"] == "avg" else "avg"
    if kinds[other] not in reader.nodes:
        raise ExportError(f"{part.name}: {reader.name} reads no pooling node")
    if other == "sum" and any(part.options["padding"]):
        raise ExportError(
            f"{part.name}: {reader.name} reads sums over windows, without padding; pool without"
        )
    count = float(np.prod(part.options["kernel_size"]))
    factor = 1.0 / count if other == "sum" else count
    for layer in _layers_behind(steps, part, reader, weights):
        weights[layer].weight *= factor
    part.options["op"] = other


def _layers_behind(
    steps: StepGraph, part: Part, reader: Reader, weights: Mapping[str, Weights]
) -> list[str]:
    found = []
    for target in steps.targets(part.name):
        alone = steps.sources(target) == [part.name]
        if alone and steps.parts[target].kind == "flatten":
            found += _layers_behind(steps, steps.parts[target], reader, weights)
        elif alone and target in weights:
            found.append(target)
        else:
            raise ExportError(
                f"{part.name} pools in another way than {reader.name} reads, whose factor cannot "
                f"go into {target}, which is no layer that it feeds alone"
            )
    return found


def _weight_node(nir: Any, part: Part, held: Weights, reader: Reader, steps: StepGraph) -> Any:
    module: Any = part.module
    weight = _array(held.weight)
    bias = None if held.bias is None else _array(held.bias)
    if isinstance(module, nn.Linear):
        if bias is None and "Linear" in reader.nodes:
            return nir.Linear(weight=weight)
        return nir.Affine(weight=weight, bias=_zeros(weight) if bias is None else bias)
    _refuse_groups(part, module, reader)
    bias = _zeros(weight) if bias is None else bias
    before = steps.parts[steps.sources(part.name)[0]].shape
    numbers = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
    if isinstance(module, nn.Conv1d):
        numbers = {k: v if isinstance(v, str) else int(v[0]) for k, v in numbers.items()}
        size: Any = int(before[-1])
    else:
        numbers = {
            k: v if isinstance(v, str) else tuple(int(n) for n in v) for k, v in numbers.items()
        }
        size = tuple(int(n) for n in before[-2:])
    kind = nir.Conv1d if isinstance(module, nn.Conv1d) else nir.Conv2d
    node = kind(input_shape=size, weight=weight, groups=int(module.groups), bias=bias, **numbers)
    node.input_type = {"input": np.array(before)}  # nir's own takes the kernel for a square
    node.output_type = {"output": np.array(part.shape)}
    return node


def _refuse_groups(part: Part, module: Any, reader: Reader) -> None:
    groups, inside = module.groups, module.in_channels // module.groups
    if groups == 1:
        return
    kind = f"{part.name} ({type(module).__name__}) {tuple(module.weight.shape)}"
    if inside % groups and reader.name != "file":
        what = "is depthwise" if inside == 1 else f"has {groups} groups of {inside} channels"
        raise ExportError(
            f"{kind} {what}, which no reader of NIR takes (they read {inside} as all its input "
            "channels); use an ordinary convolution, or target='file'"
        )
    if not reader.groups:
        raise ExportError(f"{kind} has {groups} groups, which {reader.name} does not read")


def _understood(node: Any) -> bool:
    """Whether nir infers the right shapes of a convolution by itself."""
    weight = node.weight
    return weight.ndim < 3 or (node.groups == 1 and len(set(weight.shape[2:])) == 1)


def _pattern_metadata(nm: NM | None, part: Part) -> dict[str, Any]:
    if nm is None:
        return {}
    return {
        "pattern": str(nm),
        "pattern_means": f"at most {nm.keep} of {nm.of} are not zero",
        "pattern_axis": 1,  # of input channels
    }


def _neuron(nir: Any, part: Part, node: NeuronNode, reader: Reader) -> Any:
    del reader
    return getattr(nir, node.kind)(**node.numbers)


def _other(nir: Any, part: Part, steps: StepGraph) -> Any:
    shape = np.array(part.shape)
    if part.kind == "input":
        return nir.Input(input_type={"input": shape})
    if part.kind == "output":
        return nir.Output(output_type={"output": shape})
    before = np.array(steps.parts[steps.sources(part.name)[0]].shape)
    if part.kind == "flatten":
        # counted from the end, with a batch axis or without: readers differ in counting it
        return nir.Flatten(input_type={"input": before}, start_dim=-len(before), end_dim=-1)
    kind = nir.AvgPool2d if part.options["op"] == "avg" else nir.SumPool2d
    pairs = {k: np.array(part.options[k]) for k in ("kernel_size", "stride", "padding")}
    return kind(**pairs)


def _array(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.numpy(), dtype=np.float32)


def _zeros(weight: Any) -> Any:
    return np.zeros(weight.shape[0], np.float32)
