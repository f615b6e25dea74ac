# SPDX-License-Identifier: Apache-2.0
"""Exact marginals of N draws without replacement, and the gradient of the logits through them.

The mask of a block is the union of N draws without replacement from p = softmax(kappa * pi)
(:mod:`spikenm_fx.masks.sampler`).  Its mean is P_j, the probability that j is among them:

* N = 1: P_j = p_j;
* N = 2: P_j = p_j (1 + sum over i != j of p_i / (1 - p_i));
* else by dynamic programming over subsets S in the order of their size, f(S) the probability that
  S is what the first |S| draws took: f(S + i) += f(S) p_i / (1 - p(S)), P_j = sum of f(S) over the
  S of N with j in them.

With the mask in place of its mean (straight through), dL/dpi = sum_j dL/dm_j dP_j/dpi: no noise of
the draws but that in dL/dm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from spikenm_fx.errors import PatternError
from spikenm_fx.pattern import NM

__all__ = ["check_marginals", "inclusion", "marginal_gradient"]

_MOST = 16  # M up to which subsets are gone through
_NUMBERS = 1 << 22  # that one chunk of blocks may need at a time


def check_marginals(nm: NM) -> None:
    """Let through a pattern whose marginals can be computed.

    Raises:
        PatternError: for more than two of more than 16.
    """
    if nm.keep > 2 and nm.of > _MOST:
        raise PatternError(
            f"exact marginals of {nm}: for more than two draws they are computed up to blocks of "
            f"{_MOST}; use gradient='draws'"
        )


@torch.no_grad()
def inclusion(
    logits: Tensor, keep: int, *, kappa: float | Tensor = 1.0, present: Tensor | None = None
) -> Tensor:
    """The probability of each position to be among ``keep`` draws; sums to ``keep`` in a block.

    Args:
        logits: ``(lead, M, inner)``, at least float32.
        keep: N.
        kappa: logit scale; a tensor for one of each row, ``(lead, 1, 1)``.
        present: bool ``(lead, M, 1)``, False at padded positions, which are never drawn.
    """
    p = _probabilities(logits, kappa, present)
    if keep == 1:
        return p
    if keep == 2:
        return p * (1 + _others(p / _rest(p)))
    return _in_chunks(p, lambda part: _by_subsets(part, keep))


@torch.no_grad()
def marginal_gradient(
    grad: Tensor,
    logits: Tensor,
    keep: int,
    *,
    kappa: float | Tensor = 1.0,
    present: Tensor | None = None,
) -> Tensor:
    """Gradient of sum(grad * inclusion(logits)) with respect to the logits.

    Args:
        grad: dL/dm, ``(lead, M, inner)``.
        logits: of that shape.
        keep: N.
        kappa: as in :func:`inclusion`.
        present: as in :func:`inclusion`.
    """
    p = _probabilities(logits, kappa, present)
    h = grad.to(p.dtype)
    if keep == 1:
        return p * (h * _others(p) - _others(p * h)) * kappa
    if keep == 2:
        return _gradient_of_two(p, h) * kappa
    return _in_chunks(p, lambda part, g: _through_subsets(part, g, keep), h) * kappa


def _probabilities(logits: Tensor, kappa: float | Tensor, present: Tensor | None) -> Tensor:
    z = (logits if logits.dtype == torch.float64 else logits.float()) * kappa
    if present is not None:
        z = z.masked_fill(~present, -torch.inf)
    z = z - z.amax(1, keepdim=True)
    z = z.clamp_min(-60.0)  # beyond, ratios of probabilities would leave the range of float32
    if present is not None:
        z = z.masked_fill(~present, -torch.inf)
    return torch.softmax(z, 1).nan_to_num(0.0)


def _others(values: Tensor) -> Tensor:
    """The sum over the other positions of a block, without the error of a difference."""
    before = values.cumsum(1).roll(1, 1)
    before[:, 0] = 0
    after = values.flip(1).cumsum(1).roll(1, 1)
    after[:, 0] = 0
    return before + after.flip(1)


def _rest(p: Tensor) -> Tensor:
    """1 - p."""
    return _others(p).clamp_min(torch.finfo(p.dtype).tiny)


def _gradient_of_two(p: Tensor, h: Tensor) -> Tensor:
    """p_k (A_k - sum over i != k of q_i A_i), A_k = (1 - p_k) dL/dp_k and q = p / (1 - p).

    As differences from 1 - p alone: however close to 1 a probability is, nothing cancels.
    """
    rest = _rest(p)
    q = p / rest
    a = rest * h * (1 + _others(q)) + _others(h * p) / rest
    return p * (a - _others(q * a))


@functools.cache
def _levels(of: int, keep: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]:
    """For each draw: subsets that were taken, who is next, what that makes, and what is left."""
    levels = []
    for size in range(keep):
        subsets = list(combinations(range(of), size))
        index = {subset: i for i, subset in enumerate(combinations(range(of), size + 1))}
        steps = [
            (number, item, index[tuple(sorted((*subset, item)))])
            for number, subset in enumerate(subsets)
            for item in range(of)
            if item not in subset
        ]
        left = torch.ones(len(subsets), of, dtype=torch.float64, device="cpu")
        for number, subset in enumerate(subsets):
            left[number, list(subset)] = 0
        source, item, target = torch.tensor(steps, dtype=torch.int64, device="cpu").unbind(1)
        levels.append((source, item, target, left))
    return tuple(levels)


def _by_subsets(p: Tensor, keep: int) -> Tensor:
    """Marginals of ``(blocks, M)`` probabilities."""
    of = p.shape[1]
    taken = p.new_ones(len(p), 1)
    for source, item, target, left in _levels(of, keep):
        source, item, target = (index.to(p.device) for index in (source, item, target))
        rest = (p @ left.to(p).T).clamp_min(torch.finfo(p.dtype).tiny)
        flow = (taken / rest)[:, source] * p[:, item]
        taken = p.new_zeros(len(p), int(target.max()) + 1).index_add(1, target, flow)
    members = p.new_zeros(taken.shape[1], of)
    for number, subset in enumerate(combinations(range(of), keep)):
        members[number, list(subset)] = 1
    return taken @ members


def _through_subsets(p: Tensor, h: Tensor, keep: int) -> Tensor:
    with torch.enable_grad():
        z = p.clamp_min(torch.finfo(p.dtype).tiny).log().detach().requires_grad_()
        total = (_by_subsets(torch.softmax(z, 1), keep) * h).sum()
        (found,) = torch.autograd.grad(total, z)
    return found * (p > 0)


def _in_chunks(p: Tensor, function: Callable[..., Tensor], *others: Tensor) -> Tensor:
    """``function`` of ``(blocks, M)``, for as many blocks at a time as memory allows."""
    flat = [each.movedim(1, -1).flatten(0, 1) for each in (p, *others)]
    chunk = max(_NUMBERS // 2 ** p.shape[1], 1)
    parts = [function(*part) for part in zip(*(each.split(chunk) for each in flat), strict=True)]
    whole = torch.cat(parts) if parts else flat[0]
    return whole.view(p.shape[0], p.shape[2], p.shape[1]).movedim(-1, 1)
