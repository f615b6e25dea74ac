# SPDX-License-Identifier: Apache-2.0
"""A layer's convolution with another kernel: by which operations are counted."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from spikenm_fx._torch import ConvNd, ConvTransposeNd

__all__ = ["correlated"]

_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def correlated(layer: ConvNd, probe: Tensor, kernel: Tensor, out: tuple[int, ...]) -> Tensor:
    """The layer's own convolution, without bias, with ``kernel`` for its weight.

    Args:
        layer: of any kind of convolution.
        probe: ``[N, C, *spatial]``.
        kernel: of the weight's shape, or with fewer output channels.
        out: the output's spatial shape (tells ``output_size`` of transposed convolutions).
    """
    dims = probe.dim() - 2
    if isinstance(layer, ConvTransposeNd):
        sizes = zip(
            out,
            probe.shape[2:],
            layer.stride,
            map(int, layer.padding),
            layer.dilation,
            layer.kernel_size,
            strict=True,
        )
        extra = [o - ((n - 1) * s - 2 * p + d * (k - 1) + 1) for o, n, s, p, d, k in sizes]
        return _TRANSPOSED[dims - 1](
            probe, kernel, None, layer.stride, layer.padding, extra, layer.groups, layer.dilation
        )
    padding: str | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        probe = F.pad(probe, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0,) * dims
    return _CONV[dims - 1](probe, kernel, None, layer.stride, padding, layer.dilation, layer.groups)
