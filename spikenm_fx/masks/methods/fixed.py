# SPDX-License-Identifier: Apache-2.0
"""What methods without learnt scores have in common: everything but the choice of the mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["FixedRule"]


class FixedRule(ABC):
    """A mask by a fixed rule, the same in training and evaluation; only kept weights learn."""

    __slots__ = ()

    learns: ClassVar[bool] = False
    fixed: ClassVar[bool] = True
    remembers: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    relative: ClassVar[bool] = False
    moving_prior: ClassVar[float] = 0.0
    step_size: ClassVar[float] = 0.0

    @property
    def decay(self) -> float | None:
        """None: what is not kept rests."""
        return None

    @property
    def rescale(self) -> bool:
        """The weights stay as they are."""
        return False

    def pattern(self, nm: NM) -> NM:
        """As asked for."""
        return nm

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """No temperatures; nothing to freeze."""
        return Schedule(total_steps)

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """None: a weight of any shape needs no scores for a fixed rule."""
        return None

    def logits(self, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor:
        """The scores themselves, of the shape they were made with."""
        return scores

    def train_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The final mask, bool ``(lead, M, inner)``: the same in training and evaluation."""
        return self.final_mask(weight, logits, draw)

    @abstractmethod
    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The rule itself: which positions of blocks ``(lead, M, inner)`` stay."""

    def score_grad(self, grad: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """Never asked for, as no scores, of whatever shape, are learnt."""
        raise NotImplementedError

    def remember(self, weight: Tensor, scores: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Never asked for, unless a rule remembers; shapes as of the protocol."""
        raise NotImplementedError
