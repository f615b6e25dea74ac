# SPDX-License-Identifier: Apache-2.0
"""A fixed random mask: what sparsity costs when nobody chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.masks.sampler import draw_mask

__all__ = ["RandomMask"]


@dataclass(frozen=True, slots=True)
class RandomMask(FixedRule):
    """N of M uniformly at random, drawn once from (seed, layer) and kept for the whole run."""

    name: ClassVar[str] = "random"

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """N uniform draws in each block of ``(lead, M, inner)``, by the key of step 0."""
        assert draw.key is not None
        flat = torch.zeros_like(weight, dtype=torch.float32)
        return draw_mask(
            flat, draw.nm.keep, kappa=1.0, key=draw.key, noise=draw.noise, present=draw.present
        )
