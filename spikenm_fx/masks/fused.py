# SPDX-License-Identifier: Apache-2.0
"""The native passes: what a step does to one weight, in one walk over its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["before_step", "draw_mask", "usable"]


def usable(weight: MaskedWeight) -> bool:
    return False


def before_step(weight: MaskedWeight, step: int, *, learning: bool, scale: Tensor | None) -> bool:
    return False


def draw_mask(weight: MaskedWeight, step: int) -> bool:
    return False
