# SPDX-License-Identifier: Apache-2.0
"""Sampling N of M without replacement, and the straight-through gradient of every draw.

For a block with logits pi and scale kappa (arXiv 2511.12097 gives the structure: M logits a block,
N one-hot draws without replacement, their union; the formulas are our reading of it):

* z = kappa * pi + g with Gumbel noise g; the N largest z are N sequential draws without
  replacement from softmax(kappa * pi) (Plackett-Luce; Kool et al. 2019, Vieira 2014);
* draw k is a_k = onehot(argmax of z over what is left), the mask their union
  m = 1 - prod_k (1 - a_k);
* backward, a_k is replaced by s_k = softmax(z / tau) over what was left before draw k.

All functions take blocks of shape ``(lead, M, inner)`` (see :class:`spikenm_fx.pattern.BlockView`),
of one layer or of many, one after the other.  Where :mod:`spikenm_fx.masks.native` has a compiled
kernel it does the work in one pass; the code below is the reference and serves everywhere else,
with few operations, each over all blocks, none of which waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikenm_fx.masks import native
from spikenm_fx.masks.noise import Key, gumbel

__all__ = ["draw_mask", "straight_through", "top_mask"]

_LOWEST = torch.finfo(torch.float32).min


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
    return _mask(_taken(_finite(scores.float(), present), keep), scores, present)


def draw_mask(
    logits: Tensor,
    keep: int,
    *,
    kappa: float | Tensor,
    key: Key | None = None,
    noise: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """``keep`` draws without replacement from softmax(kappa * logits), as a bool union mask.

    Args:
        logits: ``(lead, M, inner)``.
        keep: N, the number of draws.
        kappa: logit scale; a tensor for one of each row, ``(lead, 1, 1)``.
        key: noise key of this layer and step.
        noise: instead of a key, the Gumbel noise itself.
        present: as in :func:`top_mask`.
    """
    kernel = native.kernel_for(logits, keep) if noise is None and _one(kappa) else None
    if kernel is not None:
        return native.mask(kernel, logits, keep, kappa=float(kappa), key=key, present=present)
    z = _finite(_perturbed(logits, kappa, key, noise), present)
    return _mask(_taken(z, keep), logits, present)


def straight_through(
    grad: Tensor,
    logits: Tensor,
    keep: int,
    *,
    kappa: float | Tensor,
    tau: float,
    key: Key | None = None,
    noise: Tensor | None = None,
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
        noise: instead of a key, the Gumbel noise itself.
        weight: the dense weight w in blocks; then dL/dm = ``grad`` * w is taken on the way.
        present: as in :func:`top_mask`.

    Returns:
        float32 gradient of the logits' shape.
    """
    others = (grad,) if weight is None else (grad, weight)
    kernel = native.kernel_for(logits, keep, *others) if noise is None and _one(kappa) else None
    if kernel is not None:
        assert key is not None
        return native.gradient(
            *(kernel, grad, logits, keep, float(kappa), tau, key), weight=weight, present=present
        )
    z = _finite(_perturbed(logits, kappa, key, noise), present)
    h = grad.float() if weight is None else grad.float() * weight.float()
    return draws_backward(z, h, keep, tau).mul_(_over(kappa, tau))


def _one(kappa: float | Tensor) -> bool:
    """Whether one number scales all logits: kernels know no other scale."""
    return not isinstance(kappa, Tensor) or kappa.numel() == 1


def draws_backward(z: Tensor, h: Tensor, keep: int, tau: float) -> Tensor:
    """Sum over draws k of s_k * (h_k - t_k), t_k = sum(s_k * h_k), in blocks ``(lead, M, inner)``.

    One exponential over the blocks serves all draws: y = exp((z - z_last) / tau) for what no draw
    took, z_last the smallest drawn.  Everything else follows from the drawn z_1 >= z_2 >= ... by
    the ratios r_k = exp((z_{k+1} - z_k) / tau) <= 1, so that nothing can overflow however far the
    logits are apart.  In units of exp(z_k / tau) the softmax of draw k has the sum
    S_k = 1 + r_k * S_{k+1}.  Collecting the draws, the position of draw l receives h / S_l - A_l
    with A_l = t_l / S_l + r_{l-1} * A_{l-1}, a free one y * (h * B - A_last), B as A with t = 1.
    """
    taken = _taken(z, keep)
    draws = range(taken.shape[1])
    drawn, h_drawn = z.gather(1, taken), h.gather(1, taken)
    ratio = _over(drawn[:, 1:] - drawn[:, :-1], tau).exp_()
    y = _over(z - drawn[:, -1:], tau).clamp_(max=0.0).exp_().scatter_(1, taken, 0.0)
    yh = y * h
    left, left_h = y.sum(1), yh.sum(1)  # what is left beside draw k, in units of exp(z_k / tau)
    inverse, mean = [left] * len(draws), [left] * len(draws)  # 1 / S_k and t_k
    for k in reversed(draws):
        total = 1 + left
        inverse[k] = total.reciprocal()
        mean[k] = (h_drawn[:, k] + left_h).mul_(inverse[k])
        if k:
            left = total.mul_(ratio[:, k - 1])
            left_h = left_h * ratio[:, k - 1]
    slope: Tensor = inverse[0]
    offset: Tensor = mean[0] * inverse[0]
    at_drawn = [torch.addcmul(offset, h_drawn[:, 0], inverse[0], value=-1)]  # negative, for now
    for k in draws[1:]:
        slope = torch.addcmul(inverse[k], slope, ratio[:, k - 1])
        offset = (offset * ratio[:, k - 1]).addcmul_(mean[k], inverse[k])
        at_drawn.append(torch.addcmul(offset, h_drawn[:, k], inverse[k], value=-1))
    grad: Tensor = yh.mul_(slope[:, None]).addcmul_(y, offset[:, None], value=-1)
    return grad.scatter_(1, taken, torch.stack(at_drawn, 1).neg_())


def _over(value: Any, tau: float) -> Any:
    return value if tau == 1 else value / tau


def _taken(z: Tensor, keep: int) -> Tensor:
    """Positions of the draws in their order, ``(lead, N, inner)``: the largest of what is left."""
    keep = min(keep, z.shape[1])
    if not z.numel():
        return torch.arange(keep, device=z.device)[:, None].expand(z.shape[0], keep, z.shape[2])
    first = z.argmax(1, keepdim=True)
    taken = [first]
    for _ in range(keep - 1):
        z = z.scatter(1, taken[-1], -torch.inf)
        taken.append(z.argmax(1, keepdim=True))
    return torch.cat(taken, 1) if keep > 1 else first


def _mask(taken: Tensor, like: Tensor, present: Tensor | None) -> Tensor:
    mask = torch.zeros_like(like, dtype=torch.bool).scatter(1, taken, True)
    return mask if present is None else mask & present


def _perturbed(
    logits: Tensor, kappa: float | Tensor, key: Key | None, noise: Tensor | None
) -> Tensor:
    if noise is None:
        assert key is not None
        noise = gumbel(logits, key)
    if isinstance(kappa, Tensor):
        return torch.addcmul(noise, logits.float(), kappa)
    return noise.add(logits.float(), alpha=kappa)


def _finite(z: Tensor, present: Tensor | None) -> Tensor:
    """Finite, so that the softmax of a block in which nothing is left is still a number."""
    if present is not None:
        z = z.masked_fill(~present, _LOWEST)
    return torch.nan_to_num(z, nan=_LOWEST, posinf=-_LOWEST, neginf=_LOWEST)
