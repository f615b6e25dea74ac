# SPDX-License-Identifier: Apache-2.0
"""A fixed random mask: what sparsity costs when nobody chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spikenm_fx.masks.methods import Draw, masked_grad
from spikenm_fx.masks.sampler import draw_mask
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["RandomMask"]


@dataclass(frozen=True, slots=True)
class RandomMask:
    """N of M uniformly at random, drawn once from (seed, layer) and kept for the whole run."""

    name: ClassVar[str] = "random"
    learns: ClassVar[bool] = False

    def pattern(self, nm: NM) -> NM:
        """As asked for."""
        return nm

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
        """N draws from the uniform distribution, by the key of step 0."""
        flat = torch.zeros_like(weight, dtype=torch.float32)
        return draw_mask(flat, draw.nm.keep, kappa=1.0, key=draw.start_key, present=draw.present)

    def weight_grad(self, grad: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """Only what is kept learns."""
        return masked_grad(grad, weight, mask)

    def score_grad(self, grad: Tensor, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor | None:
        """No scores are learnt."""
        return None
