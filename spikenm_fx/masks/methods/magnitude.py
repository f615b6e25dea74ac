# SPDX-License-Identifier: Apache-2.0
"""One-shot magnitude pruning, then fine-tuning: ASP (arXiv 2104.08378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spikenm_fx.masks.methods import Draw, masked_grad
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["Magnitude"]


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The N largest weights of each block at the moment of ``sparsify`` stay for good."""

    name: ClassVar[str] = "magnitude"
    learns: ClassVar[bool] = False

    def pattern(self, nm: NM) -> NM:
        """As asked for."""
        return nm

    def schedule(self, total_steps: int | None) -> Schedule:
        """No temperatures; nothing to freeze."""
        return Schedule(total_steps)

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """The magnitudes at this moment."""
        return weight.abs().float()

    def train_mask(self, weight: Tensor, scores: Tensor | None, draw: Draw) -> Tensor:
        """The same in training and evaluation."""
        return self.final_mask(weight, scores, draw)

    def final_mask(self, weight: Tensor, scores: Tensor | None, draw: Draw) -> Tensor:
        """The N largest magnitudes of the start."""
        assert scores is not None
        return top_mask(scores, draw.nm.keep, draw.present)

    def weight_grad(self, grad: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Only what is kept learns."""
        return masked_grad(grad, weight, mask)

    def score_grad(self, grad: Tensor, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor | None:
        """No scores are learnt."""
        return None
