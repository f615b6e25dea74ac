# SPDX-License-Identifier: Apache-2.0
"""Which operations fire: they turn analog data into {0,1}, {-1,0,1} or a multiple of it.

A step function of the user's own (an autograd Function), or a comparison with a threshold however
it is written.  What only gates an analog value (``x * (x > 0)``), compares constants or learned
parameters alone, or draws at random (a rate code) is no neuron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from spikenm_fx.trace.analysis.flow import Flow
from spikenm_fx.trace.analysis.nodes import value_inputs
from spikenm_fx.trace.analysis.ops import op_name
from spikenm_fx.trace.analysis.signal import Signal
from spikenm_fx.trace.execution.values import SurrogateCall, ValueInfo

__all__ = ["Firing", "find_firings"]

_COMPARE = ("gt", "ge", "lt", "le", "heaviside", "sign", "signbit")
_ROUND = ("round", "floor", "ceil", "trunc", "clamp", "clamp_min", "clamp_max", "floor_divide")
_RANDOM = ("rand", "rand_like", "randn", "randn_like", "bernoulli", "uniform", "normal", "randint")
_GATES = ("mul", "div", "where", "masked_fill", "setitem", "getitem", "index_put", "masked_scatter")
_COPIES = ("to", "type", "float", "double", "half", "detach", "clone", "contiguous")


@dataclass(frozen=True, slots=True)
class Firing:
    """One operation that fires, once.

    Attributes:
        node: the operation.
        source: the analog value that it compares.
        emitted: the signals in which its spikes go on.
    """

    node: fx.Node
    source: fx.Node
    emitted: tuple[Signal, ...]


def find_firings(
    nodes: Sequence[fx.Node], signals: Mapping[fx.Node, Signal], flow: Flow
) -> list[Firing]:
    """The operations that fire, in their order.

    Args:
        nodes: all operations, in order.
        signals: what flows out of each.
        flow: tells which of them are layers and neuron modules.
    """
    made_of_data: set[fx.Node] = set()
    for node in nodes:
        known = node.op in ("placeholder", "call_module")
        if known or any(source in made_of_data for source in value_inputs(node)):
            made_of_data.add(node)
    found = []
    for node in nodes:
        if node not in made_of_data:
            continue
        if isinstance(node.target, SurrogateCall):
            if node.meta.get("steps", True):
                source = next(s for s in node.all_input_nodes if s in made_of_data)
                found.append(Firing(node, source, (signals[node],)))
            continue
        compared = _compared(node, signals, made_of_data)
        if compared is not None:
            emitted = _emitted(node, signals, flow, made_of_data)
            if emitted:
                found.append(Firing(node, compared, emitted))
    return found


def _compared(
    node: fx.Node, signals: Mapping[fx.Node, Signal], made_of_data: set[fx.Node]
) -> fx.Node | None:
    """The analog data that ``node`` compares with a threshold, or rounds to few levels."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = op_name(node)
    if name in _ROUND:
        bounded = signals[node].levels is not None
        if not bounded or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        if signals[node.args[0]].levels is not None:
            return None  # few levels already
    elif name not in _COMPARE:
        return None
    sources = [s for s in node.all_input_nodes if s in made_of_data]
    analog = [s for s in sources if not signals[s].is_multiple or name in _ROUND]
    random = any(op_name(_uncopied(s)) in _RANDOM for s in node.all_input_nodes if _is_op(s))
    return analog[0] if analog and not random else None


def _uncopied(node: fx.Node) -> fx.Node:
    while _is_op(node) and op_name(node) in _COPIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_op(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method")


def _emitted(
    node: fx.Node, signals: Mapping[fx.Node, Signal], flow: Flow, made_of_data: set[fx.Node]
) -> tuple[Signal, ...]:
    """The signals in which ``node``'s spikes leave for something else than a gate."""
    scope = node.meta.get("scope")
    waiting, seen = [node], {node}
    emitted: list[Signal] = []
    inner: list[Signal] = []
    for one in waiting:
        for user in one.users:
            if user in seen:
                continue
            if not _is_op(user) or flow.is_layer(user) or isinstance(user.target, SurrogateCall):
                emitted.append(signals[one])
            elif signals[user].is_multiple and signals[user].levels is not None:
                if _numel(user) > 1 or _numel(one) == 1:
                    seen.add(user)
                    waiting.append(user)
                if user.meta.get("scope") != scope:
                    emitted.append(signals[one])
            elif op_name(user) in ("mul", "div") and not _others(user, one) & made_of_data:
                seen.add(user)  # scaled by constants, one for each channel
                waiting.append(user)
            elif op_name(user) not in (*_GATES, *_COMPARE):
                inner.append(signals[one])
    return tuple(dict.fromkeys(emitted or inner))


def _others(user: fx.Node, node: fx.Node) -> set[fx.Node]:
    return set(user.all_input_nodes) - {node}


def _numel(node: fx.Node) -> int:
    info: ValueInfo | None = node.meta.get("value")
    if info is None or info.shape is None:
        return 2
    size = 1
    for length in info.shape:
        size *= length
    return size
