# SPDX-License-Identifier: Apache-2.0
"""Which axis of a model's input is time, as its trace shows: the samples lie along the other."""

from __future__ import annotations

from typing import Any

from torch import fx

from spikenm_fx.trace.analysis.ops import op_name
from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["sample_axis", "time_axis"]


def sample_axis(graph: SpikingGraph | None) -> int:
    """The axis of the first input that runs over samples: 1 where time is first, else 0."""
    return 1 if graph is not None and time_axis(graph) == 0 else 0


def time_axis(graph: SpikingGraph) -> int | None:
    """The axis of the first input along which neurons or a loop go step by step; None unknown."""
    if graph.operations is None:
        return None
    first = next((n for n in graph.operations.nodes if n.op == "placeholder"), None)
    if first is None:
        return None
    told = [e["time_axis"] for _, _, e in graph.nx.out_edges(first.name, data=True)]
    known = next((axis for axis in told if axis is not None), None)
    return _axis_of_loop(first) if known is None else int(known)


def _axis_of_loop(node: fx.Node) -> int | None:
    """The axis that is taken apart step by step: by indices of a loop, or by unbind."""
    taken: dict[int, set[int]] = {}
    for user in node.users:
        if user.op not in ("call_function", "call_method"):
            continue
        name = op_name(user)
        if name == "unbind":
            return int(_argument(user, 1, "dim", 0))
        if name in ("permute", "transpose"):
            inner = _axis_of_loop(user)
            if inner is not None:
                return _before(user, name, inner)
        if name == "getitem":
            for axis, index in _indices(user.args[1]):
                # steps after the first few stand for one of these
                times = 1 + int(user.meta.get("repeats", 0))
                taken.setdefault(axis, set()).update(range(index, index + times))
    return next((axis for axis, indices in taken.items() if len(indices) > 1), None)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _indices(index: Any) -> list[tuple[int, int]]:
    """Axes that an index of whole numbers and full slices takes one element of."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is ... or part is None for part in parts):
        return []
    return [(axis, part) for axis, part in enumerate(parts) if type(part) is int]


def _before(node: fx.Node, name: str, axis: int) -> int | None:
    """Where ``axis`` of a permuted tensor was before."""
    order = [a for arg in node.args[1:] for a in (arg if isinstance(arg, tuple) else (arg,))]
    if not all(isinstance(a, int) and a >= 0 for a in order):
        return None
    if name == "permute":
        return int(order[axis]) if axis < len(order) else None  # type: ignore[arg-type]
    swapped = {order[0]: order[1], order[1]: order[0]} if len(order) == 2 else {}
    return int(swapped.get(axis, axis))  # type: ignore[arg-type]
