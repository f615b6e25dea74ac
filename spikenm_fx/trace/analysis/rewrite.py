# SPDX-License-Identifier: Apache-2.0
"""Read recorded operations as what they hand on: state taken apart again, straight-through tricks.

``v, z = torch.stack([v, z])`` hands on v and z apart; ``(hard - soft).detach() + soft`` has the
value of ``hard`` and the derivative of ``soft``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from spikenm_fx.trace.analysis.ops import op_name
from spikenm_fx.trace.execution.values import ValueInfo

__all__ = ["simplify"]

_SAME = ("detach", "clone", "contiguous", "alias", "identity", "lift_fresh")
_DEPTH = 8


def simplify(node: fx.Node) -> None:
    """Let ``node`` read the one value that it hands on, where it hands on one of others.

    Args:
        node: an operation; those it reads were visited before.
    """
    if node.op != "call_function":
        return
    same = _item_of_stack(node) or _straight_through(node)
    if same is not None and _shape(same) == _shape(node):
        node.target, node.args, node.kwargs = torch.detach, (same,), {}


def _behind(node: Any) -> Any:
    """What ``node`` is a copy of."""
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in _SAME:
        node = node.args[0]
    return node


def _item_of_stack(node: fx.Node) -> fx.Node | None:
    """The member of a stack, or what was written at the same place, that ``node`` takes out."""
    place = _place(node)
    if place is None:
        return None
    source, axis, index = place
    while isinstance(source := _behind(source), fx.Node):
        name = op_name(source) if source.op == "call_function" else ""
        if name == "stack" and isinstance(source.args[0], tuple | list):
            members: Any = source.args[0]
            along = source.kwargs.get("dim", source.args[1] if len(source.args) > 1 else 0)
            return (
                members[index] if along == axis and -len(members) <= index < len(members) else None
            )
        if name != "setitem" or axis != 0 or not isinstance(source.args[1], int):
            return None
        size = (_shape(source) or (0,))[0]
        if not size or not isinstance(source.args[2], fx.Node):
            return None
        if source.args[1] % size == index % size:
            return source.args[2]
        source = source.args[0]
    return None


def _place(node: fx.Node) -> tuple[Any, int, int] | None:
    """What ``node`` takes one index out of, the axis and the index."""
    name, given = op_name(node), node.args
    if name == "getitem" and isinstance(given[1], int) and isinstance(given[0], fx.Node):
        source = given[0]
        if source.op == "call_function" and op_name(source) == "unbind":
            axis: Any = source.kwargs.get("dim", source.args[1] if len(source.args) > 1 else 0)
            return source.args[0], axis, given[1]
        return (source, 0, given[1]) if _shape(source) is not None else None
    if name == "select" and len(given) == 3 and all(isinstance(k, int) for k in given[1:]):
        axis, index = cast("tuple[int, int]", given[1:])
        return given[0], axis, index
    return None


def _straight_through(node: fx.Node) -> fx.Node | None:
    """The one value left of a sum in which others cancel."""
    if op_name(node) not in ("add", "sub"):
        return None
    terms: dict[fx.Node, int] = {}
    if not _add(node, 1, terms, _DEPTH):
        return None
    left = {term: count for term, count in terms.items() if count}
    if len(left) == len(terms) or len(left) != 1:
        return None
    term, count = next(iter(left.items()))
    return term if count == 1 else None


def _add(node: fx.Node, sign: int, terms: dict[fx.Node, int], depth: int) -> bool:
    """Add ``sign`` times ``node`` to ``terms``; False where it holds something else."""
    node = _behind(node)
    if not isinstance(node, fx.Node):
        return False
    name = op_name(node) if node.op == "call_function" else ""
    if depth and name in ("add", "sub") and not node.kwargs and len(node.args) == 2:
        first, second = node.args
        if isinstance(first, fx.Node) and isinstance(second, fx.Node):
            other = sign if name == "add" else -sign
            return _add(first, sign, terms, depth - 1) and _add(second, other, terms, depth - 1)
    terms[node] = terms.get(node, 0) + sign
    return True


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    info: ValueInfo | None = node.meta.get("value")
    return None if info is None else info.shape
