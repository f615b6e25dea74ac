# SPDX-License-Identifier: Apache-2.0
"""Weights that belong to a neuron: they mix its time steps, or control its constants.

A module that fires and takes what layers outside of it computed is a neuron with weights of its own
where the data reaches its threshold beside these weights (a controller of tau), or where they sum
over another axis than the channels (a matrix over time steps, as in the parallel spiking neuron).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spikenm_fx.trace.analysis.firing import Firing
from spikenm_fx.trace.analysis.flow import Flow
from spikenm_fx.trace.analysis.nodes import value_inputs, walk
from spikenm_fx.trace.analysis.ops import op_name
from spikenm_fx.trace.execution.values import ValueInfo

__all__ = ["weights_of_neurons"]


def weights_of_neurons(
    nodes: Sequence[fx.Node], firings: Mapping[str, Sequence[Firing]], flow: Flow
) -> dict[fx.Node, str]:
    """Products with weights that belong to neurons, and the neuron of each.

    Args:
        nodes: all operations, in order.
        firings: what fires, by the neuron's name.
        flow: tells which operations are layers.
    """
    scopes: dict[str, list[str]] = {}
    for name, members in firings.items():
        scopes.setdefault(str(members[0].node.meta["scope"]), []).append(name)
    layers = [node for node in nodes if flow.is_layer(node)]
    found: dict[fx.Node, str] = {}
    for scope, names in scopes.items():
        nested = any(other != scope and _is_in(other, scope) for other in scopes)
        inside = [node for node in layers if _is_in(flow.identity(node), scope)]
        alone = scope and len(names) == 1 and not nested and inside
        if alone and _are_neurons_own(inside, firings[names[0]], scope, flow):
            found |= dict.fromkeys(inside, names[0])
    return found


def _is_in(name: str, scope: str) -> bool:
    return name.startswith(f"{scope}.")


def _are_neurons_own(
    inside: Sequence[fx.Node], members: Sequence[Firing], scope: str, flow: Flow
) -> bool:
    fires = {member.node for member in members}
    outside: list[fx.Node] = []
    for node in inside:
        for source in _sources(flow.data_inputs(node), flow):
            if source in fires or (flow.is_layer(source) and _is_in(flow.identity(source), scope)):
                continue
            if not flow.is_layer(source):
                return False  # spikes, or the model's input: a synapse
            outside.append(source)
    if not outside:
        return False
    beside = _sources([member.source for member in members], flow)
    if any(flow.is_layer(s) and not _is_in(flow.identity(s), scope) for s in beside):
        return True
    return all(
        _sums_over_another_axis(node, source)
        for node in inside
        for source in _sources(flow.data_inputs(node), flow)
        if source in outside
    )


def _sources(starts: Sequence[fx.Node], flow: Flow) -> list[fx.Node]:
    """The layers, neurons and inputs that the values of ``starts`` come from."""
    found: list[fx.Node] = []

    def stop(node: fx.Node) -> bool:
        if flow.is_layer(node) or flow.is_neuron(node) or node.op == "placeholder":
            found.append(node)
            return True
        return node.op == "get_attr"

    walk(starts, value_inputs, stop)
    return found


def _sums_over_another_axis(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` sums over an axis of ``source``'s output that is not its channels."""
    data = next(n for n in node.all_input_nodes if _reads(n, source))
    try:
        numbers = _channel_numbers(data, source)
    except Exception:  # an operation that cannot be run again: nothing is known
        return False
    weight_first = op_name(node) in ("matmul", "mm", "bmm", "addmm", "baddbmm") and (
        data in (node.args[1:2] if op_name(node) in ("matmul", "mm", "bmm") else node.args[2:3])
    )
    along = numbers.movedim(-2 if weight_first else -1, -1)
    return along.shape[-1] > 1 and bool((along == along[..., :1]).all())


def _channel_numbers(data: fx.Node, source: fx.Node) -> Tensor:
    """The number of the channel of ``source`` that each value of ``data`` comes from."""
    shape = _shape(source)
    axis = len(shape) - 1 if op_name_of(source) == "linear" else max(len(shape) - 3, 1)
    start = torch.arange(shape[axis]).view(*(-1 if k == axis else 1 for k in range(len(shape))))
    values: dict[fx.Node, Any] = {source: start.expand(shape).contiguous().float()}

    def value(node: fx.Node) -> Any:
        if node not in values:
            first = next(n for n in node.all_input_nodes if _reads(n, source))
            if node.op == "call_module" or _shape(node) == _shape(first):
                values[node] = value(first)  # a norm, or arithmetic that keeps every place
            else:
                target: Any = node.target
                values[node] = target(
                    *fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value)
                )
        return values[node]

    found: Tensor = value(data)
    return found


def op_name_of(node: fx.Node) -> str:
    """The kind of product, of a module as of a function."""
    module = node.meta.get("module")
    if module is None:
        return op_name(node)
    return "linear" if isinstance(module, torch.nn.Linear) else "conv"


def _reads(node: fx.Node, source: fx.Node) -> bool:
    seen, waiting = {node}, [node]
    while waiting:
        one = waiting.pop()
        if one is source:
            return True
        new = [n for n in one.all_input_nodes if n not in seen]
        seen.update(new)
        waiting += new
    return False


def _shape(node: fx.Node) -> tuple[int, ...]:
    info: ValueInfo | None = node.meta.get("value")
    return () if info is None or info.shape is None else info.shape
