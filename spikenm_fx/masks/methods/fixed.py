# SPDX-License-Identifier: Apache-2.0
"""What methods without learnt scores have in common: everything but the choice of the mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from spikenm_fx.masks.methods import Draw, kept
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["FixedRule"]


class FixedRule(ABC):
    """A mask by a fixed rule, the same in training and evaluation; only kept weights learn."""

    __slots__ = ()

    learns: ClassVar[bool] = False

    def pattern(self, nm: NM) -> NM:
        """As asked for."""
        return nm

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """No temperatures; nothing to freeze."""
        return Schedule(total_steps)

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """None are needed."""
        return None

    def logits(self, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor:
        """The scores themselves."""
        return scores

    def train_mask(self, weight: Tensor, scores: Tensor | None, draw: Draw) -> Tensor:
        """The same in training and evaluation."""
        return self.final_mask(weight, scores, draw)

    @abstractmethod
    def final_mask(self, weight: Tensor, scores: Tensor | None, draw: Draw) -> Tensor:
        """The rule."""

    def weight_grad(
        self, grad: Tensor, weight: Tensor, mask: Tensor, draw: Draw, first: bool
    ) -> Tensor:
        """Only what is kept learns; in a fade, the rest as much as it takes part."""
        return kept(grad, mask, draw.undrawn)

    def score_grad(self, grad: Tensor, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor | None:
        """No scores are learnt."""
        return None
