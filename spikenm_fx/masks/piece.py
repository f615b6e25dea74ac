# SPDX-License-Identifier: Apache-2.0
"""Large weights go through a step piece by piece, so that what it needs meanwhile stays small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikenm_fx.masks.noise import Key, gumbel_of_runs

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["Piece", "most_at_once", "pieces_of", "rows_of"]

_ON_CPU, _ELSEWHERE = 2**21, 2**24
_PIECES = 8  # that the most of a pass is cut into, where a weight is cut at all


def most_at_once(device: torch.device, *, cut: bool = False) -> int:
    """How many scores one pass handles: a pass needs about 60 bytes a score.

    Args:
        device: where it runs.
        cut: of pieces of a weight; they are smaller, as a large weight takes much memory itself.
    """
    most = _ON_CPU if device.type == "cpu" else _ELSEWHERE
    return most // _PIECES if cut else most


def rows_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape ``(rows, ...)`` some rows at a time; small ones as they are."""
    first = tensors[0]
    if first.numel() <= most_at_once(first.device):
        yield tensors
        return
    rows = max(most_at_once(first.device, cut=True) * len(first) // first.numel(), 1)
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def pieces_of(weights: Iterable[MaskedWeight]) -> list[Any]:
    """Each weight itself, or the pieces of a large one, in order."""
    found: list[Any] = []
    for weight in weights:
        scores, view = weight.scores, weight.view
        rows = 0 if scores is None or view.transposed or scores.grad is not None else view.shape[0]
        most = most_at_once(weight.mask.device)
        whole = weight.method.remembers or weight.method.guided  # these go by all of a weight
        if scores is None or rows < 2 or scores.numel() <= most or whole:
            found.append(weight)
            continue
        step = max(most_at_once(weight.mask.device, cut=True) * rows // scores.numel(), 1)
        found += [Piece(weight, r, min(r + step, rows)) for r in range(0, rows, step)]
    return found


class Piece:
    """Some output channels of a masked weight, with all that a pass asks a whole one for.

    Args:
        weight: the whole one, or the part of it that this rank holds.
        first: its first output channel.
        end: after its last one.
    """

    def __init__(self, weight: MaskedWeight, first: int, end: int) -> None:
        self.owner, self.first, self.end = weight, first, end
        self.view = replace(weight.view, shape=(end - first, *weight.view.shape[1:]))
        self.shard, self.method, self.schedule = weight.shard, weight.method, weight.schedule
        self.run, self.prior = weight.run, weight.prior
        self.guide, self.dense = weight.guide, weight.dense
        self.spread, self.faded, self.undrawn = weight.spread, weight.faded, weight.undrawn
        self.numbers_of_scores, self.key_at = weight.numbers_of_scores, weight.key_at

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor[self.first : self.end]

    def _leads(self, scores: Tensor) -> Tensor:
        blocks = scores.shape[0] // self.owner.view.shape[0]
        return scores[self.first * blocks : self.end * blocks]

    @property
    def values(self) -> Tensor:
        """Of the dense weight."""
        return self._rows(self.owner.values)

    @property
    def grad(self) -> Tensor | None:
        """Of the weight's gradient."""
        grad = self.owner.grad
        return None if grad is None else self._rows(grad)

    @property
    def mask(self) -> Tensor:
        """Of the mask of training."""
        return self._rows(self.owner.mask)

    @property
    def credits(self) -> Tensor | None:
        """Of the running credits."""
        credits = self.owner.credits
        return None if credits is None else self._rows(credits)

    @property
    def scores(self) -> Tensor | None:
        """Of the scores, ``(lead, K, inner)``."""
        scores = self.owner.scores
        return None if scores is None else self._leads(scores.detach())

    def credit(self) -> None:
        """None: weights of methods that are guided are not cut."""

    def momentum_now(self) -> Tensor:
        """Of the momentum of the scores."""
        return self._leads(self.owner.momentum_now())

    def noise_start(self) -> int | None:
        """As of a whole weight."""
        scores = self.scores
        assert scores is not None
        if self.shard is not None:
            return self.shard.noise_start(scores.shape[1], (self.first, self.end))
        return self.first * (scores.numel() // (self.end - self.first))

    def noise(self, key: Key) -> Tensor:
        """Of the Gumbel noise of the weight, the very bits."""
        scores = self.scores
        assert scores is not None
        if self.shard is not None:
            rows = (self.first, self.end)
            return self.shard.noise(key, scores.shape[1], scores.device, rows)
        start = self.noise_start()
        assert start is not None
        noise = gumbel_of_runs(start, 1, scores.numel(), 0, key, scores.device)
        return noise.view(scores.shape)
