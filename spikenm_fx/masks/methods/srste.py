# SPDX-License-Identifier: Apache-2.0
"""SR-STE: magnitude masks anew at every step (arXiv 2102.04010)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["SRSTE"]


@dataclass(frozen=True, slots=True)
class SRSTE(FixedRule):
    """The N largest weights of each block now; pruned weights learn on and decay.

    Backward (eq. 6 there): grad_w = grad + decay * (1 - m) * w, a dense straight-through gradient
    and a pull to zero on pruned weights alone.

    Attributes:
        decay: lambda_w, 2e-4 in the paper.
        rescale: as of :class:`~spikenm_fx.masks.methods.spikenm.SpikeNM`; not in the paper.
        fade: of the schedule where ``total_steps`` is known; not in the paper.
    """

    name: ClassVar[str] = "srste"
    fixed: ClassVar[bool] = False
    decay: float = 2e-4
    rescale: bool = False
    fade: float = 0.0

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """Nothing to anneal; a fade, if one is asked for, where the run's length is known."""
        return Schedule(total_steps, fade=self.fade if total_steps is not None else 0.0)

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The N largest magnitudes of the present weight in each block of ``(lead, M, inner)``."""
        return top_mask(weight.abs(), draw.nm.keep, draw.present)
