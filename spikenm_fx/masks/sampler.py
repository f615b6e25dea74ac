# SPDX-License-Identifier: Apache-2.0
"""Sampling N of M without replacement, and the straight-through gradient of every draw.

For a block with logits pi and scale kappa (arXiv 2511.12097 gives the structure: M logits a block,
N one-hot draws without replacement, their union; the formulas are our reading of it):

* z = kappa * pi + g with Gumbel noise g; the N largest z are N sequential draws without
  replacement from softmax(kappa * pi) (Plackett-Luce; Kool et al. 2019, Vieira 2014);
* draw k is a_k = onehot(argmax of z over what is left), the mask their union
  m = 1 - prod_k (1 - a_k);
* backward, a_k is replaced by s_k = softmax(z / tau) over what was left before draw k.

All functions take blocks of shape ``(lead, M, inner)`` (see :class:`spikenm_fx.pattern.BlockView`).
Where :mod:`spikenm_fx.masks.native` has a compiled kernel it does the work in one pass; the code
below is the reference and serves everywhere else.  It walks the blocks in tiles that stay in the
processor's cache, each tile as M contiguous planes: elementwise passes, no sort and no top-k over
tiny rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spikenm_fx.masks import native
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
    kernel = native.kernel_for(scores, keep)
    if kernel is not None:
        return native.mask(kernel, scores, keep, present=present)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    space = _Space(scores.device)
    for rows in _tiles(scores):
        planes = _planes(scores[rows].float(), _rows(present, rows), space, "z")
        _store_chosen(mask[rows], ranks(planes, space), keep)
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
    kernel = native.kernel_for(logits, keep)
    if kernel is not None:
        return native.mask(kernel, logits, keep, kappa=kappa, key=key, present=present)
    mask = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    space = _Space(logits.device)
    for rows in _tiles(logits):
        perturbed = _perturb(logits, rows, kappa, key, space)
        z = _planes(perturbed, _rows(present, rows), space, "z")
        _store_chosen(mask[rows], ranks(z, space), keep)
    return _only_present(mask, present)


def straight_through(
    grad: Tensor,
    logits: Tensor,
    keep: int,
    *,
    kappa: float,
    tau: float,
    key: Key,
    weight: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """dL/dpi through all ``keep`` draws of :func:`draw_mask` with the same arguments.

    With h_k = dL/da_k = dL/dm where no other draw took the position (else 0), each draw adds
    kappa/tau * s_k * (h_k - sum(s_k * h_k)).  The noise is drawn again instead of kept.

    Args:
        grad: dL/dm, ``(lead, M, inner)``; with ``weight`` that of the masked weight.
        logits: ``(lead, M, inner)``, as in the forward pass.
        keep: N.
        kappa: logit scale.
        tau: temperature of the relaxed draws.
        key: noise key of this layer and step.
        weight: the dense weight w in blocks; then dL/dm = ``grad`` * w is taken on the way.
        present: as in :func:`top_mask`.

    Returns:
        float32 gradient of the logits' shape.
    """
    kernel = native.kernel_for(logits, keep, grad, *(() if weight is None else (weight,)))
    if kernel is not None:
        return native.gradient(
            *(kernel, grad, logits, keep, kappa, tau, key), weight=weight, present=present
        )
    grad_logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    space = _Space(logits.device)
    for rows in _tiles(logits):
        perturbed = _perturb(logits, rows, kappa, key, space)
        z = _planes(perturbed, _rows(present, rows), space, "z")
        grad_mask = grad[rows] if weight is None else grad[rows] * weight[rows]
        h = _planes(grad_mask.float(), None, space, "h")
        _store(grad_logits[rows], draws_backward(z, h, keep, tau, space).mul_(kappa / tau))
    return grad_logits


class _Space:
    """Work space of one call, reused from tile to tile: fresh memory would cost more than the sums.

    ``space("name", like)`` is an uninitialised tensor of the shape of ``like``.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < like.numel():
            buffer = torch.empty(like.numel(), dtype=dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[: like.numel()].view(like.shape)


def ranks(planes: Tensor, space: _Space | None = None) -> Tensor:
    """How many positions of its block beat each one: float ``(M, n)``, permutations of 0..M-1.

    Every pair has exactly one winner (the larger, on ties the first), so at most N positions have
    a rank below N whatever the values are.
    """
    space = space or _Space(planes.device)
    m = planes.shape[0]
    rank = space("rank", planes)
    if m > _PAIRWISE_UP_TO:
        order = planes.argsort(dim=0, descending=True, stable=True)
        position = torch.arange(m, device=planes.device, dtype=rank.dtype)
        return rank.scatter_(0, order, position[:, None].expand_as(planes))
    first_wins = space("first_wins", planes[0])
    for j in range(m):
        rank[j].fill_(m - 1 - j)  # as if every later position won ...
    for i in range(m):
        for j in range(i + 1, m):
            torch.ge(planes[i], planes[j], out=first_wins)
            rank[i].sub_(first_wins)  # ... corrected where it does not
            rank[j].add_(first_wins)
    return rank


def draws_backward(
    z: Tensor, h: Tensor, keep: int, tau: float, space: _Space | None = None
) -> Tensor:
    """Sum over draws k of s_k * (h_k - t_k), t_k = sum(s_k * h_k), on planes ``(M, n)``.

    One exponential over the planes serves all draws: y = exp((z - z_last) / tau) for what no draw
    took, z_last the smallest drawn.  Everything else follows from the drawn z_1 >= z_2 >= ... by
    the ratios r_k = exp((z_{k+1} - z_k) / tau) <= 1, so that nothing can overflow however far the
    logits are apart.  In units of exp(z_k / tau) the softmax of draw k has the sum
    S_k = 1 + r_k * S_{k+1}.  Collecting the draws, the position of draw l receives h / S_l - A_l
    with A_l = t_l / S_l + r_{l-1} * A_{l-1}, a free one y * (h * B - A_last), B as A with t = 1.
    """
    space = space or _Space(z.device)
    rank = ranks(z, space)
    draws = range(min(keep, len(z)))
    drawn = [torch.eq(rank, draw, out=space(f"drawn{draw}", z)) for draw in draws]
    free = torch.ge(rank, keep, out=space("free", z))
    work = space("work", z)
    z_at = [torch.mul(z, taken, out=work).sum(0) for taken in drawn]
    h_at = [torch.mul(h, taken, out=work).sum(0) for taken in drawn]
    ratio = [(z_at[k + 1] - z_at[k]).mul_(1 / tau).exp_() for k in draws[:-1]]
    y = torch.sub(z, z_at[-1], out=space("y", z)).mul_(1 / tau).clamp_(max=0.0).exp_().mul_(free)
    yh = torch.mul(y, h, out=work)
    left, left_h = y.sum(0), yh.sum(0)  # what is left beside draw k, in units of exp(z_k / tau)
    inverse, mean = [left] * len(drawn), [left] * len(drawn)  # 1 / S_k and t_k
    for k in reversed(draws):
        inverse[k] = (1 + left).reciprocal_()
        mean[k] = (h_at[k] + left_h).mul_(inverse[k])
        if k:
            left = (1 + left).mul_(ratio[k - 1])
            left_h = left_h * ratio[k - 1]
    slope, offset = torch.zeros_like(left), torch.zeros_like(left)
    grad = space("grad", z).zero_()
    for k in draws:
        if k:
            slope.mul_(ratio[k - 1])
            offset.mul_(ratio[k - 1])
        slope.add_(inverse[k])
        offset.addcmul_(mean[k], inverse[k])
        grad.addcmul_(drawn[k], h_at[k] * inverse[k] - offset)
    return grad.add_(yh.mul_(slope)).sub_(y.mul_(offset))


def _perturb(logits: Tensor, rows: slice, kappa: float, key: Key, space: _Space) -> Tensor:
    tile = logits[rows]
    noise = space("noise", tile)
    bits = space("bits", tile, torch.int32).view(-1)
    shifted = space("shifted", tile, torch.int32).view(-1)
    gumbel_(noise, key, rows.start * tile.shape[1] * tile.shape[2], bits, shifted)
    return noise.add_(tile, alpha=kappa)


def _tiles(blocks: Tensor) -> Iterator[slice]:
    lead, m, inner = blocks.shape
    tile = _TILE.get(blocks.device.type, blocks.numel())
    rows = max(1, tile // max(m * inner, 1))
    for start in range(0, lead, rows):
        yield slice(start, min(start + rows, lead))


def _planes(tile: Tensor, present: Tensor | None, space: _Space, name: str) -> Tensor:
    """``(rows, M, inner)`` as M contiguous planes of finite numbers; the lowest for what is absent.

    Finite, so that the softmax of a block in which nothing is left is still a number.
    """
    if present is not None:
        tile = tile.masked_fill(~present, _LOWEST)
    planes = space(name, tile.movedim(1, 0))
    # plane by plane: torch copies a transposed matrix of four columns six times slower
    _store(tile, planes, back=True)
    return torch.nan_to_num_(planes.view(len(planes), -1), nan=_LOWEST)


def _store(tile: Tensor, planes: Tensor, *, back: bool = False) -> None:
    """Copy planes into a tile ``(rows, M, inner)``, or back."""
    for side, plane in zip(tile.unbind(1), planes, strict=True):
        if back:
            plane.copy_(side)
        else:
            side.copy_(plane.view(side.shape))


def _store_chosen(mask: Tensor, rank: Tensor, keep: int) -> None:
    for target, plane in zip(mask.unbind(1), rank, strict=True):
        torch.lt(plane.view(target.shape), keep, out=target)


def _rows(present: Tensor | None, rows: slice) -> Tensor | None:
    return None if present is None else present[rows]


def _only_present(mask: Tensor, present: Tensor | None) -> Tensor:
    return mask if present is None else mask & present
