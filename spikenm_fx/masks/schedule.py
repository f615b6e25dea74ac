# SPDX-License-Identifier: Apache-2.0
"""How the sampler's scale and temperature move over training, and when the masks freeze."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spikenm_fx.errors import PlanError

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Scale kappa, temperature tau and the final freeze as functions of the optimizer step.

    With ``total_steps`` kappa grows fivefold and linearly over the part before the freeze (as in
    MaskLLM, arXiv 2409.17481, Table 7), tau likewise, and for the last
    ``freeze`` of the steps the masks stay at the top N of the logits, so that weights and
    normalisation statistics adapt to the masks that ``fold`` will bake in.

    With ``fade`` the mask comes gradually: what was not drawn is multiplied by a factor that falls
    linearly from 1 to 0 over that share of the steps before the freeze, so that training starts
    with the dense weights.  Until it is 0 the weights of training mode are not N:M; those of
    evaluation mode, of checkpoints and of ``fold`` always are.

    Without ``total_steps`` kappa grows by its first value every ``open_steps`` steps and never
    stops: the sampling noise fades by itself as 1/step, and no horizon needs to be known.

    Attributes:
        total_steps: optimizer steps of the whole run, or None.
        kappa: first and last logit scale; for SpikeNM in units of one over the logits' spread.
        tau: first and last temperature of the straight-through draws.
        freeze: share of ``total_steps``, at the end, with frozen masks.
        fade: share of the steps before the freeze over which undrawn weights fade out; with 0
            every step is N:M.  Needs ``total_steps``.
        open_steps: steps in which the open-ended schedule adds one ``kappa[0]``.
    """

    total_steps: int | None = None
    kappa: tuple[float, float] = (3.0, 15.0)
    tau: tuple[float, float] = (1.0, 1.0)
    freeze: float = 0.15
    fade: float = 0.0
    open_steps: int = 200

    def __post_init__(self) -> None:
        if self.total_steps is not None and (
            isinstance(self.total_steps, bool)
            or not isinstance(self.total_steps, int)
            or self.total_steps < 1
        ):
            raise PlanError(
                f"total_steps={self.total_steps!r}: give the number of optimizer steps of the "
                "whole run as a positive integer, or None for an open-ended schedule"
            )
        if not 0 <= self.freeze < 1:
            raise PlanError(f"freeze={self.freeze}: the frozen share must be in [0, 1)")
        if not 0 <= self.fade <= 1 or (self.fade and self.total_steps is None):
            raise PlanError(
                f"fade={self.fade} with total_steps={self.total_steps}: it is a share of the steps "
                "before the freeze, in [0, 1], and needs the number of steps of the whole run"
            )
        if not all(0 < value < math.inf for value in (*self.kappa, *self.tau, self.open_steps)):
            raise PlanError(
                f"kappa={self.kappa}, tau={self.tau}, open_steps={self.open_steps}: "
                "scales, temperatures and steps must be positive and finite"
            )

    def frozen(self, step: int) -> bool:
        """Whether the masks of optimizer step ``step`` (from 0) are the final ones."""
        return self.total_steps is not None and step >= self._search_steps

    def kappa_at(self, step: int) -> float:
        """Logit scale at ``step``."""
        if self.total_steps is None:
            return self.kappa[0] * (1 + step / self.open_steps)
        return self._linear(self.kappa, step)

    def tau_at(self, step: int) -> float:
        """Temperature at ``step``."""
        return self.tau[1] if self.total_steps is None else self._linear(self.tau, step)

    def progress(self, step: int) -> float:
        """From 0 at the first step to 1 at the freeze; 0 throughout where the end is unknown."""
        if self.total_steps is None:
            return 0.0
        return min(step / max(self._search_steps, 1.0), 1.0)

    def undrawn_at(self, step: int) -> float:
        """What the weights that were not drawn are multiplied with at ``step``; mostly 0."""
        if not self.fade or self.frozen(step):
            return 0.0
        return max(1.0 - self.progress(step) / self.fade, 0.0)

    @property
    def _search_steps(self) -> float:
        return (self.total_steps or 0) * (1 - self.freeze)

    def _linear(self, ends: tuple[float, float], step: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * self.progress(step)
