# SPDX-License-Identifier: Apache-2.0
"""Dense training behind the same interface: the baseline that keeps everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.pattern import NM

__all__ = ["Dense"]


@dataclass(frozen=True, slots=True)
class Dense(FixedRule):
    """Masks of ones; every pattern becomes M:M."""

    name: ClassVar[str] = "dense"

    def pattern(self, nm: NM) -> NM:
        """Keep all of M."""
        return NM(nm.of, nm.of)

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """True for every position of a weight in blocks ``(lead, M, inner)``."""
        return torch.ones_like(weight, dtype=torch.bool)
