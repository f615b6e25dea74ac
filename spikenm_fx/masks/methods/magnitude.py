# SPDX-License-Identifier: Apache-2.0
"""One-shot magnitude pruning, then fine-tuning: ASP (arXiv 2104.08378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.masks.sampler import top_mask

__all__ = ["Magnitude"]


@dataclass(frozen=True, slots=True)
class Magnitude(FixedRule):
    """The N largest weights of each block at the moment of ``sparsify`` stay for good."""

    name: ClassVar[str] = "magnitude"

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """The magnitudes at this moment, float32 ``(lead, M, inner)`` as the weight in blocks."""
        return weight.abs().float()

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The N largest magnitudes of the start in each block of ``(lead, M, inner)``."""
        assert logits is not None
        return top_mask(logits, draw.nm.keep, draw.present)
