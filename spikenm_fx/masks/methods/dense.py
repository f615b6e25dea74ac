# SPDX-License-Identifier: Apache-2.0
"""Dense training behind the same interface: the baseline that keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spikenm_fx.masks.methods import Draw, masked_grad
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["Dense"]


@dataclass(frozen=True, slots=True)
class Dense:
    """Masks of ones; every pattern becomes M:M."""

    name: ClassVar[str] = "dense"
    learns: ClassVar[bool] = False

    def pattern(self, nm: NM) -> NM:
        """Keep all of M."""
        return NM(nm.of, nm.of)

    def schedule(self, total_steps: int | None) -> Schedule:
        """No temperatures; nothing to freeze."""
        return Schedule(total_steps)

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """None are needed."""
        return None

    def train_mask(self, weight: Tensor, scores: Tensor | None, draw: Draw) -> Tensor:
        """The same in training and evaluation."""
        return self.final_mask(weight, scores, draw)

    def final_mask(self, weight: Tensor, scores: Tensor | None, draw: Draw) -> Tensor:
        """Ones."""
        return torch.ones_like(weight, dtype=torch.bool)

    def weight_grad(self, grad: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Only what is kept learns."""
        return masked_grad(grad, weight, mask)

    def score_grad(self, grad: Tensor, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor | None:
        """No scores are learnt."""
        return None
