# SPDX-License-Identifier: Apache-2.0
"""The backend that every other one is measured against: unpack, then torch's own dense layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, unpack_weight

__all__ = ["dense_layer", "packed_layer"]


def dense_layer(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: LayerGeometry) -> Tensor:
    """Torch's dense Linear, Conv1d or Conv2d of this geometry.

    Args:
        x: ``(..., C)`` for linear, ``(B, C, *spatial)`` for convolutions.
        weight: dense, ``(O, C)`` or ``(O, C/groups, *kernel)``.
        bias: ``(O,)`` or None.
        geometry: of the layer.

    Returns:
        ``(..., O)`` or ``(B, O, *out)``.
    """
    if geometry.kind == "linear":
        return F.linear(x, weight, bias)
    conv = F.conv1d if geometry.kind == "conv1d" else F.conv2d
    return conv(
        x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )


def packed_layer(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Run a packed weight on ``x``, on any device, in ``x``'s dtype.

    Args:
        x: ``(*, C)`` of a linear layer, ``(N, C, *spatial)`` of a convolution.
        packed: the weight.
        bias: ``(O,)`` or None.
    """
    weight = unpack_weight(packed).to(device=x.device, dtype=x.dtype)
    return dense_layer(x, weight, bias, packed.geometry)
