# SPDX-License-Identifier: Apache-2.0
"""Which values can reach a layer at all: interval arithmetic along the recorded operations.

The model's input may be anything; weights, norms in eval mode and the neurons' update rules are
what they are.  A neuron whose membrane cannot reach the threshold emits zeros for ever, and what
follows from that is found on the way (interval bound propagation, Gowal et al., arXiv 1810.12715).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spikenm_fx._torch import BatchNormBase, ConvNd, ConvTransposeNd
from spikenm_fx.channels.reachable import can_spike
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import NeuronSpec, SpikingGraph
from spikenm_fx.trace.analysis.ops import MOVES, POOLS, RESHAPES, module_family, op_name

__all__ = ["ANYTHING", "Interval", "constant_inputs"]

ANYTHING = 1e30
"""Stands for infinity: products with zero weights stay zero."""


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """Bounds of every element of a tensor, float64, of its shape."""

    low: Tensor
    high: Tensor

    @classmethod
    def unknown(cls, shape: tuple[int, ...]) -> Interval:
        """Anything at all."""
        high = torch.full((), ANYTHING, dtype=torch.float64, device="cpu").expand(shape)
        return cls(-high, high)

    @classmethod
    def exactly(cls, value: Tensor) -> Interval:
        """The bounds of a tensor of any shape whose value is known: both are it."""
        value = value.detach().double()
        return cls(value, value)

    def clamped(self) -> Interval:
        """With everything beyond the stand-in for infinity set to it."""
        return Interval(self.low.clamp(min=-ANYTHING), self.high.clamp(max=ANYTHING))


def constant_inputs(
    graph: SpikingGraph, model: nn.Module, silent: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """For each layer, per input channel, the one value that it can ever have; NaN where it varies.

    Args:
        graph: a trace of ``model`` with example inputs.
        model: the traced model, evaluated as in eval mode.
        silent: neurons seen never to spike: by name, bool, broadcast to their output; taken for
            granted.

    Returns:
        By layer name, float64 ``[channels]``; layers that were not followed are missing.
    """
    found: dict[str, Tensor] = {}
    if graph.operations is None:
        return found
    run = _Run(graph, silent or {})
    last_use = _last_uses(graph.operations)
    with torch.no_grad():
        for node in graph.operations.nodes:
            run.visit(node)
            module = node.meta.get("module")
            if node.op == "call_module" and module is not None and is_weight_layer(module):
                seen = _constants(run.value(node.args[0]), module.weight.dim() - 2)
                known = found.get(str(node.target), seen)
                found[str(node.target)] = seen.where(seen == known, torch.nan)
            for done in last_use.get(node, ()):
                run.values.pop(done, None)
    return found


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    freed: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        freed.setdefault(node, []).append(source)
    return freed


def _constants(interval: Interval | None, spatial: int) -> Tensor:
    """``[channels]``: the value all elements of a channel have, else NaN."""
    assert interval is not None
    channel = interval.low.dim() - 1 - spatial
    low = interval.low.movedim(channel, 0).flatten(1)
    high = interval.high.movedim(channel, 0).flatten(1)
    same = (low.amin(1) == high.amax(1)) & (high.amax(1).abs() < ANYTHING)
    return low[:, 0].where(same, torch.nan)


class _Run:
    """Visits the operations in order."""

    def __init__(self, graph: SpikingGraph, silent: Mapping[str, Tensor]) -> None:
        self.neurons = {n: r.spec for n, r in graph.neurons.items() if not r.functional}
        self.silent = silent
        self.values: dict[fx.Node, Interval] = {}
        self.drives: dict[str, Tensor] = {}  # largest input of each neuron so far
        self.items: dict[Any, Mapping[int, Interval]] = {}  # of what returns several tensors

    def value(self, argument: Any) -> Interval | None:
        if isinstance(argument, fx.Node):
            return self.values.get(argument)
        if isinstance(argument, int | float):
            return Interval.exactly(torch.tensor(float(argument), device="cpu"))
        return None

    def visit(self, node: fx.Node) -> None:
        info = node.meta.get("value")
        shape = info.shape if info is not None else None
        try:
            found = self._of(node)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            found = None  # an operation that does not take these arguments: not followed
        if found is not None and (shape is None or tuple(found.low.shape) == tuple(shape)):
            self.values[node] = found.clamped()
        elif shape is not None:
            self.values[node] = Interval.unknown(tuple(shape))

    def _of(self, node: fx.Node) -> Interval | None:
        if node.op == "get_attr":
            tensor = node.meta.get("tensor")
            return Interval.exactly(tensor) if isinstance(tensor, Tensor) else None
        if node.op == "call_module":
            return self._module(node, node.meta["module"])
        if node.op not in ("call_function", "call_method"):
            return None
        name = op_name(node)
        if name in ("surrogate", "softmax", "sigmoid"):
            return _between_zero_and_one(node.meta["value"].shape)
        if name == "getitem" and node.args[0] in self.items:
            return self.items[node.args[0]].get(node.args[1])  # type: ignore[arg-type]
        rule = _RULES.get(name)
        if rule is not None:
            operands = [self.value(argument) for argument in node.args]
            known = [operand for operand in operands if operand is not None]
            return rule(*known) if len(known) == len(operands) and not node.kwargs else None
        return self._both(node) if name in _MONOTONE else None

    def _both(self, node: fx.Node) -> Interval | None:
        """An operation in which nothing falls when an input rises: on both bounds."""
        ends: list[Any] = []
        for side in ("low", "high"):
            ends_of = {n: getattr(self.values[n], side) for n in node.all_input_nodes}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), ends_of.__getitem__)
            target: Any = node.target
            call = getattr(args[0], target) if node.op == "call_method" else target
            ends.append(call(*(args[1:] if node.op == "call_method" else args), **kwargs))
        if isinstance(ends[0], Tensor):
            return Interval(ends[0].double(), ends[1].double())
        parts = zip(*ends, strict=True)
        self.items[node] = {i: Interval(low, high) for i, (low, high) in enumerate(parts)}
        return None

    def _module(self, node: fx.Node, module: nn.Module) -> Interval | None:
        x = self.value(node.args[0])
        if x is None:
            return None
        spec = self.neurons.get(str(node.target))
        if spec is not None:
            return self._neuron(node, str(node.target), spec, x)
        if is_weight_layer(module):
            return _weighted(module, x)
        family = module_family(module)
        own = copy.deepcopy(module).double().eval()
        if isinstance(module, BatchNormBase) and module.track_running_stats:
            ends = own(x.low), own(x.high)
            return Interval(torch.minimum(*ends), torch.maximum(*ends))
        if "pool" in family or "flatten" in family or family in ("identity", "relu"):
            return Interval(own(x.low), own(x.high))
        return None

    def _neuron(self, node: fx.Node, name: str, spec: NeuronSpec, x: Interval) -> Interval | None:
        if spec.output != "spike":
            return None
        drive = x.high
        if spec.time_axis is not None and not spec.folded_time:
            drive = drive.amax(spec.time_axis, keepdim=True)
        elif spec.folded_time:
            drive = drive.amax(0, keepdim=True)
        seen = self.drives.get(name)
        drive = self.drives[name] = drive if seen is None else torch.maximum(drive, seen)
        high = can_spike(spec, drive).expand(x.high.shape).double()
        if name in self.silent:
            high = high * ~self.silent[name]
        found = Interval(torch.zeros_like(high), high)
        if node.meta["value"].shape is None:
            self.items[node] = {0: found}
            return None
        return found


def _between_zero_and_one(shape: tuple[int, ...]) -> Interval:
    one = torch.ones((), dtype=torch.float64, device="cpu").expand(shape)
    return Interval(torch.zeros_like(one), one)


def _weighted(module: nn.Module, x: Interval) -> Interval | None:
    """A layer: positive weights on one bound, negative ones on the other."""
    (weight,) = (p.detach().double() for k, p in module.named_parameters() if k == "weight")
    bias = getattr(module, "bias", None)
    shift = None if bias is None else bias.detach().double()
    plus, minus = weight.clamp_min(0), weight.clamp_max(0)

    def apply(value: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if isinstance(module, nn.Linear):
            return F.linear(value, w, b)
        return _convolve(module, value, w, b)

    if isinstance(module, ConvNd) and module.padding_mode != "zeros":
        return None
    return Interval(
        apply(x.low, plus, shift) + apply(x.high, minus, None),
        apply(x.high, plus, shift) + apply(x.low, minus, None),
    )


def _convolve(module: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    spatial = weight.dim() - 2
    lead = value.shape[: -1 - spatial]
    flat = value.reshape(-1, *value.shape[-1 - spatial :])
    transposed = isinstance(module, ConvTransposeNd)
    name = f"conv_transpose{spatial}d" if transposed else f"conv{spatial}d"
    call: Callable[..., Tensor] = getattr(F, name)
    settings: dict[str, Any] = {"stride": module.stride, "padding": module.padding}
    if transposed:
        settings["output_padding"] = module.output_padding
    out = call(flat, weight, bias, groups=module.groups, dilation=module.dilation, **settings)
    return out.reshape(*lead, *out.shape[1:])


def _mul(a: Interval, b: Interval) -> Interval:
    products = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = products[0], products[0]
    for product in products[1:]:
        low, high = torch.minimum(low, product), torch.maximum(high, product)
    return Interval(low, high)


def _matmul(a: Interval, b: Interval) -> Interval | None:
    if bool((a.low < 0).any()) or bool((b.low < 0).any()):
        return None
    return Interval(a.low @ b.low, a.high @ b.high)


def _div(a: Interval, b: Interval) -> Interval | None:
    if b.low.dim() or float(b.low) != float(b.high) or float(b.low) <= 0:
        return None
    return Interval(a.low / b.low, a.high / b.low)


_RULES: dict[str, Callable[..., Interval | None]] = {
    "add": lambda a, b: Interval(a.low + b.low, a.high + b.high),
    "sub": lambda a, b: Interval(a.low - b.high, a.high - b.low),
    "rsub": lambda a, b: Interval(b.low - a.high, b.high - a.low),
    "neg": lambda a: Interval(-a.high, -a.low),
    "mul": _mul,
    "div": _div,
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("contiguous", "clone", "detach", "float", "identity"), lambda a: a),
}
_MONOTONE = (
    RESHAPES
    | MOVES
    | POOLS
    | frozenset(
        [
            "getitem",
            "select",
            "stack",
            "cat",
            "unbind",
            "chunk",
            "split",
            "mean",
            "sum",
            "relu",
            "clamp_min",
            "clamp_max",
            "expand",
            "repeat",
            "amax",
            "amin",
            "zeros",
            "ones",
            "full",
        ]
    )
)
