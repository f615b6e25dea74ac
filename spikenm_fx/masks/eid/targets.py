# SPDX-License-Identifier: Apache-2.0
"""Soft targets of a block, and the distribution that they pull at."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spikenm_fx.masks.methods import Draw

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
    values = credit if credit.dtype == torch.float64 else credit.float()
    if present is None:
        mean = values.mean(1, keepdim=True)
    else:
        there = present.to(values.dtype)
        count = there.sum(1, keepdim=True).clamp_min(1)
        mean = (values * there).sum(1, keepdim=True) / count
    if normalise == "zscore":
        values = values - mean
        if present is None:
            mean = values.square().mean(1, keepdim=True).sqrt()
        else:
            mean = ((values * there).square().sum(1, keepdim=True) / count).sqrt()
    unit = mean.clamp_min(torch.finfo(values.dtype).tiny)  # a block of zeros has uniform targets
    values = values / (unit if temperature == 1 else unit * temperature)
    if present is None:
        return torch.softmax(values, 1)
    values = values.masked_fill(~present, -torch.inf)
    return torch.softmax(values, 1).nan_to_num_()  # 0 where a block has nothing


def probabilities(logits: Tensor, draw: Draw) -> Tensor:
    """The sampling distribution softmax(kappa * pi) in blocks, 0 at padded positions."""
    return torch.softmax(scaled(logits, draw), 1)


def scaled(logits: Tensor, draw: Draw) -> Tensor:
    """Kappa * pi of ``(lead, M, inner)`` logits pi, the lowest number at padded positions."""
    scaled = logits.float() * draw.kappa
    if draw.present is not None:
        scaled = scaled.masked_fill(~draw.present, torch.finfo(torch.float32).min)
    return scaled
