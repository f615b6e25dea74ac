# SPDX-License-Identifier: Apache-2.0
"""What repositories compute by CUDA extensions of their own, in plain torch, for recipes to name.

They serve planning, checking and one-shot commands on any device; train with the repository's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wkv"]


def wkv(
    batch: int,
    steps: int,
    channels: int,
    decay: Tensor,
    bonus: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """RWKV's weighted mean over past tokens, as SpikeGPT's ``RUN_CUDA`` computes it.

    ``y[t] = (sum_{i<t} e^{k[i] - (t-1-i) e^decay} v[i] + e^{bonus + k[t]} v[t]) / (the same
    without v)``, with running maxima taken out of the exponents so that nothing overflows.

    Args:
        batch: samples; told by ``keys`` too, like the next two.
        steps: tokens.
        channels: width.
        decay: of shape ``(channels,)``; each step multiplies the past by ``exp(-exp(decay))``.
        bonus: of shape ``(channels,)``, weight of the present token.
        keys: of shape ``(batch, steps, channels)``.
        values: of the same shape.

    Returns:
        Of the same shape.
    """
    fall, found = -torch.exp(decay), []
    top = torch.full_like(keys[:, 0], -1e38)
    weighted = norm = torch.zeros_like(top)
    for step in range(steps):
        key, value = keys[:, step], values[:, step]
        peak = torch.maximum(top, bonus + key)
        past, now = torch.exp(top - peak), torch.exp(bonus + key - peak)
        found.append((past * weighted + now * value) / (past * norm + now))
        peak = torch.maximum(top + fall, key)
        past, now = torch.exp(top + fall - peak), torch.exp(key - peak)
        weighted, norm, top = past * weighted + now * value, past * norm + now, peak
    return torch.stack(found, dim=1)
