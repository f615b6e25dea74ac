# SPDX-License-Identifier: Apache-2.0
"""Spikes kept as bits, and small counts of spikes as bit planes.

A residual sum of spikes, or an average pool of them, is a small integer times a constant.  Kept as
binary digits, plane by plane, it still runs on the kernels that read bits: a layer sees
``planes`` times as many input channels, with weights times 1, 2, 4 ...
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikenm_fx.native.library import kernels
from spikenm_fx.native.threads import kernel_threads

__all__ = ["WORD", "SpikeBits", "in_row_order"]

WORD = 64  # channels of one word
MAX_PLANES = 4
FRESH: dict[str, Any] = {"exposed": None, "_dense": None, "_values": None}


@dataclass(slots=True, eq=False)
class SpikeBits:
    """Spikes of a batch as bits, or counts of spikes as binary digits.

    Attributes:
        bits: int64 ``(images * height * width, planes * words)``, one row per pixel, lowest digit
            first, within a digit channel 0 in bit 0 of the first word.
        images: of all time steps.
        size: height and width; (1, 1) for tokens of a linear layer.
        layout: the fp32 tensor that these spikes are, on the meta device.
        channels: of a row.
        highest: count that no channel can exceed; 1 for spikes.
        scale: the values are counts times this.
    """

    bits: Tensor
    images: int
    size: tuple[int, int]
    layout: Tensor
    channels: int
    highest: int = 1
    scale: float = 1.0
    exposed: Tensor | None = field(default=None, repr=False)
    _dense: Tensor | None = field(default=None, repr=False)
    _values: Tensor | None = field(default=None, repr=False)

    @property
    def words(self) -> int:
        """Words of one digit of a row."""
        return -(-self.channels // WORD)

    @property
    def planes(self) -> int:
        """How many binary digits a count takes."""
        return self.highest.bit_length()

    @property
    def code(self) -> tuple[int, float]:
        """What a layer must know to read these bits: planes, and the value of the lowest digit."""
        return self.planes, self.scale

    @property
    def binary(self) -> bool:
        """Whether the values are zeros and ones."""
        return self.code == (1, 1.0)

    def dense(self) -> Tensor:
        """fp32 values, pixel by pixel in memory."""
        if self._dense is None:
            rows = self.bits.shape[0]
            out = torch.empty_strided(
                self.layout.shape, self.layout.stride(), dtype=torch.float32, device="cpu"
            )
            flat = out.as_strided((rows, self.channels), (self.channels, 1))
            self._decode(flat, (rows, self.planes, self.channels), 1)
            self._dense = out
        return self._dense

    def values(self) -> Tensor:
        """fp32 values, contiguous: channel by channel for images."""
        if self.layout.is_contiguous():
            return self.dense()
        if self._values is None:
            self._values = torch.empty(self.layout.shape, dtype=torch.float32, device="cpu")
            pixels = self.size[0] * self.size[1]
            flat = self._values.view(self.images, self.channels, pixels)
            self._decode(flat, (self.images, self.planes, self.channels, pixels), pixels)
        return self._values

    def _decode(self, out: Tensor, digits: tuple[int, ...], pixels: int) -> None:
        """Unpack, ``pixels`` of a channel side by side, and add up the digits (axis 1)."""
        native = kernels()
        assert native is not None  # bits come from the kernels
        unpacked = out if self.binary else torch.empty(digits, dtype=torch.float32, device="cpu")
        pointers = (self.bits.data_ptr(), digits[0], self.planes, self.channels)
        threads = kernel_threads()
        if pixels == 1:
            native.unpack_rows(*pointers, unpacked.data_ptr(), threads)
        else:
            native.unpack_planes(*pointers, pixels, unpacked.data_ptr(), threads)
        if self.binary:
            return
        torch.mul(unpacked[:, 0], self.scale, out=out)
        for digit in range(1, self.planes):
            out.add_(unpacked[:, digit], alpha=self.scale * 2**digit)

    def copy(self) -> SpikeBits:
        """The same bits, so that writing to the values of one leaves the other alone."""
        return SpikeBits(
            *(self.bits, self.images, self.size, self.layout, self.channels),
            *(self.highest, self.scale),
        )

    def plus(self, other: SpikeBits) -> SpikeBits | None:
        """The sum, channel by channel; None where it has no such form."""
        highest = self.highest + other.highest
        if self.scale != other.scale or highest.bit_length() > MAX_PLANES:
            return None
        digits = _add(self._digits(self.bits), other._digits(other.bits), highest)
        bits = torch.cat(digits, dim=1)
        return replace(self, bits=bits, highest=highest, **FRESH)

    def times(self, other: SpikeBits) -> SpikeBits | None:
        """The product of spikes, channel by channel; None for counts."""
        if not (self.binary and other.binary):
            return None
        return replace(self, bits=self.bits & other.bits, **FRESH)

    def complement(self) -> SpikeBits | None:
        """1 - x for spikes; None for counts."""
        if not self.binary:
            return None
        full, rest = divmod(self.channels, WORD)
        words = [-1] * full + [(1 << rest) - 1] * bool(rest)
        mask = torch.tensor(words, dtype=torch.int64, device="cpu")
        return replace(self, bits=self.bits ^ mask, **FRESH)

    def max_pool(
        self, kernel: list[int], stride: list[int], padding: list[int]
    ) -> SpikeBits | None:
        """Max-pooling of spikes: the OR of the rows in a window; None for counts."""
        if self.planes > 1:
            return None
        pooled: Tensor | None = None
        for part in self._window(kernel, stride, padding):
            pooled = part.clone() if pooled is None else pooled.bitwise_or_(part)
        assert pooled is not None
        return self._pooled([pooled], self.highest, self.scale)

    def avg_pool(self, kernel: list[int], stride: list[int]) -> SpikeBits | None:
        """The mean of a window as its count; None where that is not exact or has many digits."""
        area = kernel[0] * kernel[1]
        highest = self.highest * area
        if area & (area - 1) or highest.bit_length() > MAX_PLANES:
            return None
        parts = [self._digits(part) for part in self._window(kernel, stride, [0, 0])]
        top = self.highest
        while len(parts) > 1:  # pairs of equally large counts, as area is a power of two
            top *= 2
            parts = [_add(a, b, top) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return self._pooled(parts[0], highest, self.scale / area)

    def _digits(self, bits: Tensor) -> list[Tensor]:
        return list(bits.split(self.words, dim=-1))

    def _window(self, kernel: list[int], stride: list[int], padding: list[int]) -> list[Tensor]:
        """The rows at each place of a pooling window, ``(images, height, width, words)``."""
        h, w = self.size
        grid = self.bits.view(self.images, h, w, -1)
        if any(padding):
            grid = F.pad(grid, [0, 0, padding[1], padding[1], padding[0], padding[0]])
        out_h = (h + 2 * padding[0] - kernel[0]) // stride[0] + 1
        out_w = (w + 2 * padding[1] - kernel[1]) // stride[1] + 1
        return [
            grid[
                :,
                dy : dy + (out_h - 1) * stride[0] + 1 : stride[0],
                dx : dx + (out_w - 1) * stride[1] + 1 : stride[1],
            ]
            for dy in range(kernel[0])
            for dx in range(kernel[1])
        ]

    def _pooled(self, digits: list[Tensor], highest: int, scale: float) -> SpikeBits:
        grid = torch.cat(digits, dim=-1) if len(digits) > 1 else digits[0]
        size = (grid.shape[1], grid.shape[2])
        layout = torch.empty(
            (self.images, self.channels, *size),
            dtype=torch.float32,
            device="meta",
            memory_format=torch.channels_last,
        )
        bits = grid.reshape(self.images * size[0] * size[1], -1)
        return SpikeBits(bits, self.images, size, layout, self.channels, highest, scale)


def in_row_order(meta: Tensor, channel_axis: int, channels: int) -> bool:
    """Whether a tensor's memory runs pixel by pixel, all ``channels`` of a pixel side by side.

    Args:
        meta: of any shape.
        channel_axis: along which the channels should lie.
        channels: how many.
    """
    if meta.dim() < 1 or not -meta.dim() <= channel_axis < meta.dim():
        return False
    return meta.shape[channel_axis] == channels and meta.movedim(channel_axis, -1).is_contiguous()


def _add(a: list[Tensor], b: list[Tensor], highest: int) -> list[Tensor]:
    """Add binary digits, lowest first; the sum is at most ``highest``."""
    digits: list[Tensor] = []
    carry: list[Tensor] = []
    for place in range(highest.bit_length()):
        terms = [*a[place : place + 1], *b[place : place + 1], *carry]
        if len(terms) == 1:
            digits.append(terms[0])
            carry = []
            continue
        x, y, *rest = terms
        one = x ^ y
        both = x & y
        for z in rest:
            one, both = one ^ z, both | (z & one)
        digits.append(one)
        carry = [both]
    return digits
