# SPDX-License-Identifier: Apache-2.0
"""Tensors that a forward makes first and fills item by item, read as stacks of their items.

``out = torch.empty(T, ...)`` and ``out[t] = y`` in each step is ``torch.stack`` of what is written,
where each item is written once and nobody reads the tensor before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from spikenm_fx.program.axes import spelled_out
from spikenm_fx.trace.analysis.nodes import op_name_or_none

__all__ = ["OTHER_WRITES", "stacked_writes"]

FRESH = (
    *("zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "rand", "randn", "rand_like", "randn_like"),
)
"""Operations whose numbers do not matter once each of them is written over."""

OTHER_WRITES = (
    "it writes into a tensor of which not each item is written once before it is read; collect "
    "the items in a list, and torch.stack them"
)
"""Why all other writes have no operation."""


@dataclass(frozen=True, slots=True)
class _Write:
    """One item that is written: of which axis, from where to where, and whether it has that."""

    node: fx.Node
    axis: int
    start: int
    stop: int
    keeps_axis: bool


def stacked_writes(graph: fx.Graph) -> fx.Graph:
    """The same operations with a stack or concatenation in the place of complete writes.

    Args:
        graph: as recorded; it is not changed.

    Returns:
        A copy where anything was written so; else the graph itself.
    """
    chains = [_complete(node) for node in graph.nodes if op_name_or_none(node) == "setitem"]
    if not any(chains):
        return graph
    last = {chain[-1].node: chain for chain in chains if chain}
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node in last:
            copies[node] = _joined(made, last[node], copies)
        else:
            copies[node] = made.node_copy(node, copies.__getitem__)
            copies[node].meta = copy.copy(node.meta)
    for node in reversed([*graph.nodes]):
        if not copies[node].users and (op_name_or_none(node) in ("setitem", *FRESH)):
            made.erase_node(copies[node])
    return made


def _joined(made: fx.Graph, chain: list[_Write], copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """One operation on all that a chain writes."""
    items: Any = [copies[w.node.args[2]] for w in sorted(chain, key=lambda w: w.start)]  # type: ignore[index]
    join = torch.cat if chain[0].keeps_axis else torch.stack
    found = made.call_function(join, (items, chain[0].axis))
    found.meta = copy.copy(chain[-1].node.meta)
    return found


def _complete(node: fx.Node) -> list[_Write]:
    """The writes up to this one, where each item of a new tensor is written once; else none."""
    chain: list[_Write] = []
    at: Any = node
    while isinstance(at, fx.Node) and op_name_or_none(at) == "setitem":
        write = _write(at)
        if write is None or (at is not node and len(at.users) != 1):
            return []
        chain.append(write)
        at = at.args[0]
    if op_name_or_none(at) not in FRESH or len(at.users) != 1:
        return []
    if len({(w.axis, w.keeps_axis) for w in chain}) != 1:
        return []
    ends = sorted((w.start, w.stop) for w in chain)
    starts, stops = [start for start, _ in ends], [stop for _, stop in ends]
    whole = at.meta["value"].shape[chain[0].axis]
    return chain[::-1] if starts == [0, *stops[:-1]] and stops[-1] == whole else []


def _write(node: fx.Node) -> _Write | None:
    """Which item one operation writes; None where it is none, or not written as it is."""
    shape, value = _shape(node.args[0]), _shape(node.args[2])
    place = _place(node.args[1], shape) if shape is not None and value is not None else None
    if place is None or shape is None or value is None:
        return None
    axis, start, stop, keeps_axis = place
    rest = (stop - start,) if keeps_axis else ()
    if value != (*shape[:axis], *rest, *shape[axis + 1 :]):
        return None
    return _Write(node, axis, start, stop, keeps_axis)


def _place(index: Any, shape: tuple[int, ...]) -> tuple[int, int, int, bool] | None:
    """The one axis that an index takes a part of, from where to where, and whether it stays."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(item, int | slice) and item is not Ellipsis for item in items):
        return None
    if sum(item is Ellipsis for item in items) > 1 or len(items) > len(shape) + 1:
        return None
    places = enumerate(spelled_out(index, len(shape)))
    parts = [(axis, item) for axis, item in places if item != slice(None)]
    if len(parts) != 1 or isinstance(parts[0][1], bool):
        return None
    axis, item = parts[0]
    if isinstance(item, int):
        start = item % shape[axis]
        return axis, start, start + 1, False
    start, stop, step = item.indices(shape[axis])
    return (axis, start, stop, True) if step == 1 and stop > start else None


def _shape(node: Any) -> tuple[int, ...] | None:
    info = node.meta.get("value") if isinstance(node, fx.Node) else None
    return None if info is None else info.shape
