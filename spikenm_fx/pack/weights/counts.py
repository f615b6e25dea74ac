# SPDX-License-Identifier: Apache-2.0
"""Weights for inputs that are counts of spikes, one binary digit after the other."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spikenm_fx.pack.engine.spikes import WORD
from spikenm_fx.pack.weights.format import PackedWeight, pack_weight, unpack_weight

__all__ = ["weight_for_counts"]


def weight_for_counts(packed: PackedWeight, planes: int, scale: float) -> PackedWeight:
    """The weight of a layer whose input channels are the binary digits of counts.

    Args:
        packed: of the layer, without groups, its pattern's ``of`` a divisor of 64.
        planes: digits, lowest first; each fills whole words of channels.
        scale: value of a count of one.

    Returns:
        ``planes * words * 64`` input channels, at the same pattern.  int8 weights stay integers,
        times powers of two.
    """
    row_scale = packed.scale
    if row_scale is None:
        weight = unpack_weight(packed).float() * scale
    else:
        integers = packed.values.float()
        weight = unpack_weight(replace(packed, values=integers, scale=None))
        row_scale = row_scale * scale
    digits = [_padded(weight) * 2**digit for digit in range(planes)]
    counting = pack_weight(torch.cat(digits, dim=1), packed.nm, geometry=packed.geometry)
    return counting if row_scale is None else replace(counting, scale=row_scale)


def _padded(weight: Tensor) -> Tensor:
    spatial = weight.dim() - 2
    return F.pad(weight, [0, 0] * spatial + [0, -weight.shape[1] % WORD])
