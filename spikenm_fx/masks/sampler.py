# SPDX-License-Identifier: Apache-2.0
"""Sampling N of M without replacement, and the straight-through gradient of every draw.

For a block with logits pi and scale kappa (arXiv 2511.12097 gives the structure: M logits a block,
N one-hot draws without replacement, their union; the formulas are our reading of it):

* z = kappa * pi + g with Gumbel noise g; the N largest z are N sequential draws without
  replacement from softmax(kappa * pi) (Plackett-Luce; Kool et al. 2019, Vieira 2014);
* draw k is a_k = onehot(argmax of z over what is left), the mask their union
  m = 1 - prod_k (1 - a_k);
* backward, a_k is replaced by s_k = softmax(z / tau) over what was left before draw k.

All functions take blocks of shape ``(lead, M, inner)`` (see :class:`spikenm_fx.pattern.BlockView`)
and walk them in tiles that stay in the processor's cache, each tile as M contiguous planes: a few
fused elementwise passes, no sort and no top-k over tiny rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from spikenm_fx.masks.noise import Key, gumbel_

__all__ = ["draw_mask", "straight_through", "top_mask"]

_TILE = {"cpu": 1 << 18}  # elements a tile; on accelerators one launch over everything is best
_LOWEST = torch.finfo(torch.float32).min
_PAIRWISE_UP_TO = 16  # beyond that many comparisons a sort is cheaper


def top_mask(scores: Tensor, keep: int, present: Tensor | None = None) -> Tensor:
    """The deterministic mask: the ``keep`` largest scores of each block, first index first on ties.

    Args:
        scores: ``(lead, M, inner)``, any float dtype; NaN counts as minus infinity.
        keep: how many stay.
        present: bool ``(lead, M, 1)``; False where a padded position can never be kept.

    Returns:
        bool mask of the same shape, exactly ``keep`` True per block, fewer where fewer exist.
    """
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rows in _tiles(scores):
        planes = _planes(scores[rows].float(), _rows(present, rows))
        _store(mask[rows], ranks(planes) < keep)
    return _only_present(mask, present)


def draw_mask(
    logits: Tensor, keep: int, *, kappa: float, key: Key, present: Tensor | None = None
) -> Tensor:
    """``keep`` draws without replacement from softmax(kappa * logits), as a bool union mask.

    Args:
        logits: ``(lead, M, inner)``.
        keep: N, the number of draws.
        kappa: logit scale.
        key: noise key of this layer and step.
        present: as in :func:`top_mask`.
    """
    mask = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    for rows in _tiles(logits):
        planes = _planes(_perturb(logits, rows, kappa, key), _rows(present, rows))
        _store(mask[rows], ranks(planes) < keep)
    return _only_present(mask, present)


def straight_through(
    grad_mask: Tensor,
    logits: Tensor,
    keep: int,
    *,
    kappa: float,
    tau: float,
    key: Key,
    present: Tensor | None = None,
) -> Tensor:
    """dL/dpi through all ``keep`` draws of :func:`draw_mask` with the same arguments.

    With h_k = dL/da_k = dL/dm where no other draw took the position (else 0), each draw adds
    kappa/tau * s_k * (h_k - sum(s_k * h_k)).  The noise is drawn again instead of kept.

    Args:
        grad_mask: dL/dm, ``(lead, M, inner)``.
        logits: ``(lead, M, inner)``, as in the forward pass.
        keep: N.
        kappa: logit scale.
        tau: temperature of the relaxed draws.
        key: noise key of this layer and step.
        present: as in :func:`top_mask`.

    Returns:
        float32 gradient of the logits' shape.
    """
    grad = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    for rows in _tiles(logits):
        z = _planes(_perturb(logits, rows, kappa, key), _rows(present, rows))
        h = _planes(grad_mask[rows].float(), None)
        _store(grad[rows], _draws_backward(z, h, keep, tau).mul_(kappa / tau))
    return grad


def ranks(planes: Tensor) -> Tensor:
    """How many positions of its block beat each one: int ``(M, n)``, a permutation of 0..M-1.

    Every pair has exactly one winner (the larger, on ties the first), so at most N positions have
    a rank below N whatever the values are.
    """
    m = planes.shape[0]
    if m > _PAIRWISE_UP_TO:
        order = planes.argsort(dim=0, descending=True, stable=True)
        position = torch.arange(m, device=planes.device)[:, None].expand_as(order)
        return torch.empty_like(order).scatter_(0, order, position)
    rank = torch.arange(m - 1, -1, -1, dtype=torch.int8, device=planes.device)
    rank = rank[:, None].repeat(1, planes.shape[1])  # as if every later position won ...
    for i in range(m):
        for j in range(i + 1, m):
            first_wins = (planes[i] >= planes[j]).view(torch.int8)
            rank[i].sub_(first_wins)  # ... corrected where it does not
            rank[j].add_(first_wins)
    return rank


def _draws_backward(z: Tensor, h: Tensor, keep: int, tau: float) -> Tensor:
    rank = ranks(z)
    alone = h * (rank >= keep)  # what no draw took reaches every draw
    grad = torch.zeros_like(z)
    for draw in range(min(keep, z.shape[0])):
        taken = rank == draw
        best = torch.where(taken, z, -math.inf).amax(0)
        s = torch.where(rank >= draw, z, -math.inf).sub_(best).mul_(1 / tau).exp_()
        s.div_(s.sum(0))
        h_draw = torch.where(taken, h, alone)
        grad.add_(s.mul_(h_draw.sub_((s * h_draw).sum(0))))
    return grad


def _perturb(logits: Tensor, rows: slice, kappa: float, key: Key) -> Tensor:
    tile = logits[rows]
    noise = torch.empty(tile.shape, dtype=torch.float32, device=tile.device)
    gumbel_(noise, key, rows.start * tile.shape[1] * tile.shape[2])
    return noise.add_(tile, alpha=kappa)


def _tiles(blocks: Tensor) -> Iterator[slice]:
    lead, m, inner = blocks.shape
    tile = _TILE.get(blocks.device.type, blocks.numel())
    rows = max(1, tile // max(m * inner, 1))
    for start in range(0, lead, rows):
        yield slice(start, min(start + rows, lead))


def _planes(tile: Tensor, present: Tensor | None) -> Tensor:
    """``(rows, M, inner)`` as M contiguous planes of finite numbers; the lowest for what is absent.

    Finite, so that the softmax of a block in which nothing is left is still a number.
    """
    if present is not None:
        tile = tile.masked_fill(~present, _LOWEST)
    planes = rearrange(tile, "l m i -> m (l i)").contiguous()
    return torch.nan_to_num(planes, nan=_LOWEST)


def _store(tile: Tensor, planes: Tensor) -> None:
    tile.copy_(rearrange(planes, "m (l i) -> l m i", i=tile.shape[2]))


def _rows(present: Tensor | None, rows: slice) -> Tensor | None:
    return None if present is None else present[rows]


def _only_present(mask: Tensor, present: Tensor | None) -> Tensor:
    return mask if present is None else mask & present
