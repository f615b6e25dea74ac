# SPDX-License-Identifier: Apache-2.0
"""Whether zeros of parameters stay in place on the way to a product, found by trying it.

What was recorded between a parameter and its product reads parameters and constants alone, so it
can be computed again with other values: with one input channel kept, and with one weight kept in
each row.  Where the operand then holds that channel alone, and one weight in each of its rows, a
block of the parameter is a block of what is multiplied, whatever the operations are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikenm_fx.trace.execution.calls import written_argument

__all__ = ["axis_of_blocks", "parts_of_sum"]

_TRIALS = 2
"""Draws per test: a mixture of rows passes one with a chance of 1 in the number of channels to the
power of the number of rows."""


def parts_of_sum(operand: fx.Node, matrices: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of ``matrices`` that ``operand`` holds side by side, or adds, not multiplies.

    Args:
        operand: what is multiplied with data; made of parameters and constants alone.
        matrices: its parameters of two axes or more.
    """
    found: list[fx.Node] = []
    for one in matrices if len(matrices) > 1 else ():
        others = {m: torch.zeros_like(m.meta["tensor"]) for m in matrices if m is not one}
        with contextlib.suppress(Exception):  # an operation that cannot be run again
            if bool(_nonzero(operand, others).any()):
                found.append(one)
    return found if len(found) > 1 else []


def axis_of_blocks(operand: fx.Node, parts: Sequence[fx.Node], summed: int) -> int | None:
    """The axis of the parameters ``parts`` along which blocks lie as they do in ``operand``.

    Args:
        operand: what is multiplied with data; made of parameters and constants alone.
        parts: the parameters that are masked, all along the same axis.
        summed: the axis of ``operand`` that the product sums over.

    Returns:
        0 or 1, or None where zeros move or are filled.
    """
    try:
        whole = _nonzero(operand, {}).movedim(summed, -1)
        for axis in (1, 0):
            sizes = {part.meta["tensor"].shape[axis] for part in parts}
            if sizes == {whole.shape[-1]} and _holds(operand, parts, summed, axis):
                return axis
    except Exception:  # an operation that cannot be run again: nothing is known of it
        return None
    return None


def _holds(operand: fx.Node, parts: Sequence[fx.Node], summed: int, axis: int) -> bool:
    channels = parts[0].meta["tensor"].shape[axis]
    some = False
    for channel in {0, channels // 2, channels - 1}:
        masked = {part: _one_channel(part.meta["tensor"], axis, channel) for part in parts}
        kept = _nonzero(operand, masked).movedim(summed, -1)
        elsewhere = torch.arange(channels, device=kept.device) != channel
        if bool(kept[..., elsewhere].any()):
            return False
        some = some or bool(kept.any())
    for _ in range(_TRIALS):
        masked = {part: _one_per_row(part.meta["tensor"], axis) for part in parts}
        if int(_nonzero(operand, masked).movedim(summed, -1).sum(-1).max()) > 1:
            return False
    return some


def _one_channel(like: Tensor, axis: int, channel: int) -> Tensor:
    mask = torch.zeros_like(like)
    mask.select(axis, channel).fill_(1.0)
    return _positive(like) * mask


def _one_per_row(like: Tensor, axis: int) -> Tensor:
    places = torch.rand_like(like, dtype=torch.float).argmax(axis, keepdim=True)
    return _positive(like) * torch.zeros_like(like).scatter_(axis, places, 1.0)


def _positive(like: Tensor) -> Tensor:
    return (torch.rand_like(like, dtype=torch.float) + 0.5).to(like.dtype)


@torch.no_grad()
def _nonzero(operand: fx.Node, given: Mapping[fx.Node, Tensor]) -> Tensor:
    """Where ``operand`` is not zero, for positive parameters or those ``given``."""
    needed = _ancestors(operand)
    values: dict[fx.Node, Any] = {}
    for node in operand.graph.nodes:
        if node in needed:
            values[node] = given[node].clone() if node in given else _compute(node, values)
        if node is operand:
            break
    return torch.nan_to_num(values[operand]) != 0


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    return found


def _compute(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        tensor = node.meta["tensor"].detach()
        return (
            _positive(tensor) if isinstance(node.meta["tensor"], nn.Parameter) else tensor.clone()
        )
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    target: Any = node.target
    done = target(*args, **kwargs)
    written = written_argument(target, args)
    return done if written is None else written
