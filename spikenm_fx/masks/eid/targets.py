# SPDX-License-Identifier: Apache-2.0
"""Soft targets of a block, and the distribution that they pull at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spikenm_fx.masks.methods import Draw
from spikenm_fx.pattern import planes

__all__ = ["probabilities", "scaled", "soft_targets"]


def soft_targets(
    credit: Tensor,
    present: Tensor | None,
    temperature: float,
    normalise: Literal["mean", "zscore"] = "mean",
) -> Tensor:
    """Q = softmax(normalised credit / temperature) over each block.

    Args:
        credit: ``(lead, M, inner)``, finite.
        present: bool ``(lead, M, 1)``, False at padded positions, which get q = 0; or None.
        temperature: T_e.
        normalise: see :class:`EID`.

    Returns:
        q of the same shape; uniform in a block whose credits are all equal, zeros included.
    """
    values = planes(credit if credit.dtype == torch.float64 else credit.float())
    if present is None:
        mean = values.mean(0)
    else:
        there = present.movedim(1, 0).to(values.dtype)
        count = there.sum(0).clamp_min(1)
        mean = (values * there).sum(0) / count
    if normalise == "zscore":
        values.sub_(mean)
        if present is None:
            mean = values.square().mean(0).sqrt()
        else:
            mean = ((values * there).square().sum(0) / count).sqrt()
    values.div_((mean + (mean == 0)) * temperature)
    if present is not None:
        values.masked_fill_(~present.movedim(1, 0), -torch.inf)
    return torch.softmax(values, 0).nan_to_num_().movedim(0, 1)


def probabilities(logits: Tensor, draw: Draw) -> Tensor:
    """The sampling distribution softmax(kappa * pi) in blocks, 0 at padded positions."""
    return torch.softmax(planes(scaled(logits, draw)), 0).movedim(0, 1)


def scaled(logits: Tensor, draw: Draw) -> Tensor:
    """Kappa * pi of ``(lead, M, inner)`` logits pi, the lowest number at padded positions."""
    scaled = logits.float() * draw.kappa
    if draw.present is not None:
        scaled = scaled.masked_fill(~draw.present, torch.finfo(torch.float32).min)
    return scaled
