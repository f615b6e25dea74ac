# SPDX-License-Identifier: Apache-2.0
"""Which order of channels keeps most under N:M: annealing and descent over swaps of two.

The sum of the N largest of M scores is that of the N largest of the M - 1 others plus
``max(0, x - t)``, with x the score left out and t the N-th largest of the others.  A swap between
two blocks therefore gains, over the rows r of all weights that read the channels,

    sum_r max(0, x_j - t_i) + max(0, x_i - t_j) - max(0, x_i - t_i) - max(0, x_j - t_j)

without any sorting.  The compiled kernel (``native/csrc/permute.h``) tries swaps one after the
other; without it, torch evaluates all of them at once and takes the best disjoint ones.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikenm_fx.native.library import Permutation, Progress, Scores, kernels
from spikenm_fx.pattern import NM

__all__ = ["Effort", "Scored", "best_order", "kept", "total"]

_LANES = 16  # rows are filled up to it, csrc/abi.h
_MAX_OF = 64  # csrc/permute.h
_HOT, _COLD = 0.3, 0.03
"""First and last temperature, in mean gains of a random swap: hotter starts found nothing more."""
_AT_ONCE = 1 << 24  # elements that the torch path compares at a time


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What one weight would lose with a channel: a column of scores for each.

    Attributes:
        scores: ``[columns, rows]`` float32, not negative; row = output channel and kernel position.
        nm: pattern of the blocks of consecutive columns, keep < of.
        fixed: columns before the first channel that share its block but do not move; columns after
            the last one likewise.
    """

    scores: Tensor
    nm: NM
    fixed: int = 0


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search; without reaching ``seconds`` the result depends on the seed alone.

    Attributes:
        proposals: swaps tried by annealing.
        tries: swaps tried, at most, by the descent after it.
        seconds: after which the search stops where it is.
    """

    proposals: int
    tries: int
    seconds: float = 10.0

    @classmethod
    def for_channels(cls, channels: int, seconds: float = 10.0, limit: int = 1 << 62) -> Effort:
        """A thousand swaps per channel for each half, at most ``limit`` together.

        Annealing with fewer swaps than there are pairs only disturbs, so descent comes first.
        """
        pairs = channels * channels // 2
        tries = min(1000 * channels + 2 * pairs, limit)
        proposals = min(1000 * channels, limit - tries)
        return cls(proposals if proposals > pairs else 0, tries, seconds)


def kept(part: Scored, order: Tensor | None = None) -> float:
    """Sum of the scores that N:M keeps.

    Args:
        part: scores of one weight.
        order: ``[channels]``, the channel at each place; None for the order as it is.
    """
    scores = part.scores if order is None else part.scores.index_select(0, _places(part, order))
    missing = -scores.shape[0] % part.nm.of
    blocks = torch.nn.functional.pad(scores, (0, 0, 0, missing)).unflatten(0, (-1, part.nm.of))
    return float(blocks.topk(part.nm.keep, dim=1).values.sum(dtype=torch.float64))


def total(part: Scored) -> float:
    """Sum of all scores."""
    return float(part.scores.sum(dtype=torch.float64))


def best_order(
    parts: Sequence[Scored],
    channels: int,
    effort: Effort | None = None,
    *,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
    native: bool = True,
) -> Tensor:
    """The order of ``channels`` that keeps most in all ``parts`` together, as far as found.

    Args:
        parts: at least one.
        channels: that can change places.
        effort: how long to search; about 50 ms for 128 channels and 64 rows by default.
        seed: of the annealing.
        progress: called with the share that is done, from 0 to 1; what it raises ends the search.
        native: False for the torch path even where the compiled kernel is there.

    Returns:
        ``[channels]`` int64: the channel that goes to each place.
    """
    effort = effort or Effort.for_channels(channels)
    found = kernels() if native else None
    fits = all(part.nm.of <= _MAX_OF for part in parts) and channels < 1 << 31
    if found is None or not fits:
        return _descend(parts, channels, effort, progress)
    return _anneal(found.permute, parts, channels, effort, seed, progress)


def _anneal(
    kernel: Callable[..., int],
    parts: Sequence[Scored],
    channels: int,
    effort: Effort,
    seed: int,
    progress: Callable[[float], object] | None,
) -> Tensor:
    order = torch.arange(channels, device="cpu")
    filled = [_filled(part.scores) for part in parts]
    table = (Scores * len(parts))(
        *(
            Scores(f.data_ptr(), f.shape[1], f.shape[0], p.fixed, p.nm.keep, p.nm.of)
            for f, p in zip(filled, parts, strict=True)
        )
    )
    raised: list[BaseException] = []

    def tell(share: float) -> int:
        try:
            if progress is not None:
                progress(share)
        except BaseException as error:  # ctypes would print it and go on
            raised.append(error)
        return len(raised)

    call = Permutation(parts=table, n_parts=len(parts), channels=channels, order=order.data_ptr())
    call.proposals, call.tries = effort.proposals, effort.tries
    call.hot, call.cold, call.seconds, call.seed = _HOT, _COLD, effort.seconds, seed % (1 << 64)
    if progress is not None:
        call.progress = Progress(tell)
    status = kernel(ctypes.byref(call))
    if raised:
        raise raised[0]
    if status:
        raise MemoryError(f"no memory to search among {channels} channels")
    return order


def _filled(scores: Tensor) -> Tensor:
    missing = -scores.shape[1] % _LANES
    return torch.nn.functional.pad(scores.float(), (0, missing)).contiguous()


def _places(part: Scored, order: Tensor) -> Tensor:
    places = torch.arange(part.scores.shape[0], device="cpu")
    places[part.fixed : part.fixed + len(order)] = order + part.fixed
    return places


# -- without the kernel ---------------------------------------------------------------------------


def _descend(
    parts: Sequence[Scored],
    channels: int,
    effort: Effort,
    progress: Callable[[float], object] | None,
) -> Tensor:
    """All swaps at once, then the best of them that share no block, until none gains."""
    order = torch.arange(channels, device="cpu")
    deadline = time.monotonic() + effort.seconds
    left = effort.proposals + effort.tries
    blocks = torch.stack(
        [(torch.arange(channels, device="cpu") + p.fixed) // p.nm.of for p in parts]
    )
    first, share = 0.0, 0.0
    while left > 0 and time.monotonic() < deadline:
        left -= channels * channels // 2
        gains = torch.stack([_gains(part, order) for part in parts]).sum(0)
        taken = _disjoint(gains.triu(1), blocks)
        first = first or float(gains.max())
        for i, j in taken:
            order[[i, j]] = order[[j, i]]
        share = max(share, 1.0 - float(gains.max()) / first if first > 0 else 1.0)
        if progress is not None:
            progress(share)
        if not taken:
            break
    return order


def _gains(part: Scored, order: Tensor) -> Tensor:
    """``[channels, channels]``: what swapping two places keeps more; 0 inside a block."""
    places = _places(part, order)
    scores = part.scores.float().index_select(0, places)
    inside = slice(part.fixed, part.fixed + len(order))
    x, t = scores[inside], _thresholds(scores, part.nm)[inside]
    step = max(_AT_ONCE // max(x.numel(), 1), 1)
    adds = torch.cat([(x - rows[:, None]).clamp_min_(0).sum(-1) for rows in t.split(step)])
    own = adds.diagonal()
    gains = adds + adds.T - own[:, None] - own
    block = torch.arange(scores.shape[0], device="cpu")[inside] // part.nm.of
    return gains.masked_fill(block[:, None] == block, 0.0)


def _thresholds(scores: Tensor, nm: NM) -> Tensor:
    """For each place the N-th largest score among the others of its block, row by row."""
    padded = torch.nn.functional.pad(scores, (0, 0, 0, -scores.shape[0] % nm.of))
    blocks = padded.unflatten(0, (-1, nm.of))
    ranked = blocks.sort(dim=1, descending=True).values
    last, next_one = ranked[:, nm.keep - 1 : nm.keep], ranked[:, nm.keep : nm.keep + 1]
    others = torch.where(blocks >= last, next_one, last)
    return others.flatten(0, 1)[: scores.shape[0]]


def _disjoint(gains: Tensor, blocks: Tensor) -> list[tuple[int, int]]:
    """Pairs of the largest gains, no two of which touch a common block of any part."""
    channels = gains.shape[0]
    least = 1e-6 * float(gains.abs().max())
    values, flat = gains.flatten().topk(min(16 * channels, gains.numel()))
    taken: list[tuple[int, int]] = []
    used: list[set[int]] = [set() for _ in blocks]
    for value, place in zip(values.tolist(), flat.tolist(), strict=True):
        if value <= least:
            break
        pair = divmod(place, channels)
        own = [{int(row[pair[0]]), int(row[pair[1]])} for row in blocks]
        if all(a.isdisjoint(b) for a, b in zip(used, own, strict=True)):
            taken.append(pair)
            for a, b in zip(used, own, strict=True):
                a |= b
    return taken
