# SPDX-License-Identifier: Apache-2.0
"""Even work for processing elements: connections go from overloaded to underloaded ones.

P processing elements take one output channel each and wait for the slowest (u-Ticket, arXiv
2302.06746): utilisation is the mean over the maximum of their non-zero weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError

__all__ = ["even_counts", "evened"]


def even_counts(counts: list[int], target: float | None, exact: bool = True) -> list[int]:
    """How many connections each element of one round has afterwards; their sum stays.

    Taken from those with most until mean over maximum is the target, and given to those with least:
    as few as possible move.

    Args:
        counts: of one round of elements.
        target: utilisation; None for the evenest that whole numbers allow.
        exact: False for the evenest also where these do not allow the target.

    Raises:
        PlanError: if whole numbers do not allow the target.
    """
    total, size = sum(counts), len(counts)
    most = -(-total // size)
    if target is not None and total:
        possible = total >= target * size * most
        if exact and not possible:
            raise PlanError(
                f"utilisation={target}: {total} connections over {size} processing elements allow "
                f"at most {total / (size * most):.3f}; ask for less, or keep more of them"
            )
        most = max(most, int(total / (target * size) + 1e-9)) if possible else most
    new = [min(count, most) for count in counts]
    for _ in range(total - sum(new)):
        new[new.index(min(new))] += 1
    return new


def evened(
    mask: Tensor, size: Tensor, keep: int, pes: int, target: float | None, exact: bool = True
) -> Tensor:
    """The mask with even rows: each overloaded one loses its smallest weights.

    Each underloaded one gains its largest among those that there is room for.

    Args:
        mask: bool ``(rows, blocks, M)`` of the output channels.
        size: magnitudes of that shape; minus infinity where nothing can be connected.
        keep: how many a block may hold.
        pes: rows of one round.
        target: utilisation, see :func:`even_counts`.
        exact: see :func:`even_counts`.

    Raises:
        PlanError: if the target cannot be met.
    """
    mask = mask.clone(memory_format=torch.contiguous_format)  # rows of it are written
    have = mask.flatten(1).sum(1).tolist()
    for first in range(0, len(have), pes):
        part = have[first : first + pes]
        even = even_counts(part, target, exact)
        for row, (now, then) in enumerate(zip(part, even, strict=True), first):
            if then < now:
                _prune(mask[row], size[row], now - then)
            elif then > now:
                _grow(mask[row], size[row], keep, then - now)
    return mask


def _prune(mask: Tensor, size: Tensor, count: int) -> None:
    kept = size.masked_fill(~mask, torch.inf).flatten()
    mask.view(-1)[kept.topk(count, largest=False).indices] = False


def _grow(mask: Tensor, size: Tensor, keep: int, count: int) -> None:
    """Largest first; of a block no more than there is room for."""
    blocks, of = mask.shape
    order = torch.sort(
        size.masked_fill(mask, -torch.inf), dim=1, descending=True, stable=True
    ).indices
    places = torch.arange(of, device=order.device).expand(blocks, of)
    rank = torch.empty_like(order).scatter_(1, order, places)
    room = keep - mask.sum(1, keepdim=True)
    allowed = ~mask & (rank < room) & (size > -torch.inf)
    best = size.masked_fill(~allowed, -torch.inf).flatten()
    mask.view(-1)[best.topk(min(count, int(allowed.sum()))).indices] = True
