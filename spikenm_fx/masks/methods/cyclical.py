# SPDX-License-Identifier: Apache-2.0
"""Cyclical pruning: in each cycle weights that were pruned may return (arXiv 2202.01290).

Read in the paper (abstract): the pruning schedule is periodic, so that weights pruned erroneously
in one cycle can recover in the next ones.  That the cubic schedule repeats, that masked weights go
on receiving gradients and that the learning rate is periodic too is our reading.  For N:M it is N
that falls from M in each cycle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.masks.methods.ramp import keep_at
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["Cyclical"]

_SHORTEST = 2  # steps of a cycle: one with more than N, one with N


@dataclass(frozen=True, slots=True)
class Cyclical(FixedRule):
    """The largest weights of each block, of which N falls from M to the pattern's in each cycle.

    Until N has fallen, training is not N:M; evaluation, checkpoints and ``fold`` always are.  Where
    neither ``total_steps`` nor ``period`` is known there are no cycles, and every step is N:M.

    Attributes:
        cycles: how often N falls.
        period: optimizer steps of a cycle; by default ``total_steps / cycles``.
        ramp: share of a cycle over which N falls; for the rest of it N stays.
        decay: of masked weights, see :class:`~spikenm_fx.masks.methods.srste.SRSTE`; 0 lets them
            come back as they are.

    Raises:
        PlanError: for numbers out of their ranges, and at ``sparsify`` for cycles that do not fit
            into the run.
    """

    name: ClassVar[str] = "cyclical"
    fixed: ClassVar[bool] = False
    cycles: int = 3
    period: int | None = None
    ramp: float = 0.7
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.cycles < 1 or not 0 < self.ramp <= 1 or not 0 <= self.decay < math.inf:
            raise PlanError(
                f"cycles={self.cycles}, ramp={self.ramp}, decay={self.decay}: needs cycles >= 1, "
                "0 < ramp <= 1 and a decay that is not negative"
            )
        if self.period is not None and self.period < _SHORTEST:
            raise PlanError(f"period={self.period}: a cycle needs {_SHORTEST} optimizer steps")

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """Nothing to anneal or freeze: N alone moves.

        Raises:
            PlanError: if the cycles do not fit into ``total_steps``.
        """
        period = self.period_of(total_steps)
        if total_steps is not None and period is not None:
            if period > total_steps:
                raise PlanError(
                    f"period={period}: a cycle is longer than the whole run of {total_steps} "
                    "optimizer steps, so that N would never fall to the pattern's; shorten it"
                )
            if period < _SHORTEST:
                raise PlanError(
                    f"cycles={self.cycles} in total_steps={total_steps}: a cycle needs at least "
                    f"{_SHORTEST} optimizer steps; train longer, or in fewer cycles"
                )
        return Schedule(total_steps)

    def period_of(self, total_steps: int | None) -> int | None:
        """Optimizer steps of a cycle; None where there are none."""
        if self.period is not None or total_steps is None:
            return self.period
        return total_steps // self.cycles

    def keep_of(self, nm: NM, step: int, total_steps: int | None) -> int:
        """How many of M the mask of optimizer step ``step`` keeps."""
        period = self.period_of(total_steps)
        if period is None or step >= self.cycles * period:
            return nm.keep
        # the first step of a cycle keeps all, those after the ramp the pattern's N
        return keep_at(nm, step % period / max(self.ramp * (period - 1), 1.0))

    def learning_rate(self, step: int, total_steps: int | None) -> float:
        """A hint for the learning rate: the factor, in (0, 1], of its peak at ``step``.

        A cosine that starts anew with each cycle, so that what returns can still move; give it to
        ``torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: ...)``.
        """
        period = self.period_of(total_steps)
        if period is None or step >= self.cycles * period:
            return 1.0 if period is None else 1.0 / period
        return (1.0 + math.cos(math.pi * (step % period) / period)) / 2

    def train_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The largest magnitudes of each block ``(lead, M, inner)``, as many as the cycle keeps."""
        keep = self.keep_of(draw.nm, draw.step or 0, draw.total_steps)
        return top_mask(weight.abs(), keep, draw.present)

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The N largest magnitudes of the present weight in each block of ``(lead, M, inner)``."""
        return top_mask(weight.abs(), draw.nm.keep, draw.present)
