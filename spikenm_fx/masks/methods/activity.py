# SPDX-License-Identifier: Apache-2.0
"""SCA: channels whose membranes are most active stay, others grow by the norm (arXiv 2406.01072).

Known of the paper, whose body could not be read: the importance of a channel is the L1 norm of its
membrane potential over batch, time and space (by two reviewers' account); channels grow by the
magnitude of the gradient of the norm's gamma; sparsity follows a schedule.  Here a channel is read
by the layers after it, so that for N:M each block keeps its N most active input channels; what
grows, how often, and the cubic schedule are our reading.  The structured form, without N:M, is
``spikenm_fx.remove_channels(..., score="membrane")``.
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

__all__ = ["Activity"]


@dataclass(frozen=True, slots=True)
class Activity(FixedRule):
    """The N input channels of each block whose neurons' membranes are most active.

    Needs ``example_inputs`` at ``sparsify``, which show whose neurons feed which layer, and neurons
    whose update rule is known.  Layers without a neuron before them go by magnitude.  Until the
    density has come down, training is not N:M; evaluation, checkpoints and ``fold`` always are.

    Attributes:
        every: optimizer steps from one measurement to the next.
        ema: share of the old importance that a measurement keeps.
        growth: share of the blocks in which, at each measurement, the pruned channel with the
            largest gradient of gamma takes the place of the least active kept one.
        ramp: share of ``total_steps`` over which N falls from M to the pattern's; 0, or an unknown
            length, for N:M from the first step.
        weighted: rank |W| times activity instead of activity alone, which every output channel
            ranks alike; not in the paper.
        decay: of masked weights, see :class:`~spikenm_fx.masks.methods.srste.SRSTE`.

    Raises:
        PlanError: for numbers out of their ranges; at ``sparsify`` without examples, neurons of a
            known rule or, with growth, norms.
    """

    name: ClassVar[str] = "activity"
    fixed: ClassVar[bool] = False
    guided: ClassVar[bool] = True
    every: int = 20
    ema: float = 0.5
    growth: float = 0.1
    ramp: float = 0.5
    weighted: bool = False
    decay: float = 2e-4

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.ema < 1:
            raise PlanError(f"every={self.every}, ema={self.ema}: needs every >= 1, 0 <= ema < 1")
        if not 0 <= self.growth < 1 or not 0 <= self.ramp <= 1 or not 0 <= self.decay < math.inf:
            raise PlanError(
                f"growth={self.growth}, ramp={self.ramp}, decay={self.decay}: shares must be in "
                "[0, 1), and decay not negative"
            )

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """Nothing to anneal; measurements end with the freeze.

        Raises:
            PlanError: if the run ends before the second measurement.
        """
        schedule = Schedule(total_steps)
        if total_steps is not None and schedule.frozen(self.every):
            raise PlanError(
                f"every={self.every}: a run of total_steps={total_steps} ends before activity is "
                "measured a second time; train longer or measure more often"
            )
        return schedule

    def train_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The most active of each block ``(lead, M, inner)``, as many as the schedule keeps now."""
        keep = draw.nm.keep
        if self.ramp and draw.total_steps is not None and draw.step is not None:
            keep = keep_at(draw.nm, draw.step / (self.ramp * draw.total_steps))
        return top_mask(self._scores(weight, draw), keep, draw.present)

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The N most active of each block ``(lead, M, inner)``, or largest where none is known."""
        return top_mask(self._scores(weight, draw), draw.nm.keep, draw.present)

    def _scores(self, weight: Tensor, draw: Draw) -> Tensor:
        if draw.credit is None:
            return weight.abs().float()
        return draw.credit * weight.abs().float() if self.weighted else draw.credit
