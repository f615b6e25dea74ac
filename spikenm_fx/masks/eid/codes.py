# SPDX-License-Identifier: Apache-2.0
"""Credits as ranks send them to each other: six bits a number, of which ratios come through.

Only the ratios of credits within a block make targets.  Eight neighbours share one scale, as in
the microscaling formats of the Open Compute Project (arXiv 2310.10537), here a power of the square
root of two, and each has five bits of its own: 48 bits in all.  The five bits count the square root
of a number, so that small ones beside a large one keep a value.  What comes back is off by at most
1/31 of the scale, which is less than 1.42 times the largest of the eight; by 1/15 where some of
them are negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BYTES", "GROUP", "decoded", "encoded"]

GROUP, BYTES = 8, 6
"""Numbers that share a scale, and the bytes that they take."""
_BITS = 5
_SMALLEST = 126  # of the scales, 2 ** -63: five bits, a sign and this fill the 48


def encoded(numbers: Tensor) -> Tensor:
    """Numbers as bytes.

    Args:
        numbers: float32 ``[groups, 8]`` from -1 to 1.

    Returns:
        uint8 ``[groups, 6]``.
    """
    largest = numbers.abs().amax(1, keepdim=True)
    scale = largest.log2().mul_(-2).floor_().clamp_(0, _SMALLEST)
    signed = (numbers < 0).any(1, keepdim=True)
    levels = _levels(signed)
    roots = (numbers.abs() / _power(scale)).sqrt_().copysign_(numbers)
    codes = (roots * levels).round_().clamp_(-levels, levels) + levels * signed
    head = scale.long() | signed.long() << 7
    word = (codes.long() << _shifts(numbers.device)).sum(1, keepdim=True) | head << _BITS * GROUP
    return word.view(torch.uint8)[:, :BYTES].contiguous()  # the lower bytes come first


def decoded(sent: Tensor) -> Tensor:
    """The inverse of :func:`encoded`.

    Args:
        sent: uint8 ``[groups, 6]``.

    Returns:
        float32 ``[groups, 8]``.
    """
    word = torch.zeros(len(sent), 8, dtype=torch.uint8, device=sent.device)
    word[:, :BYTES] = sent
    words = word.view(torch.int64)
    head = words >> _BITS * GROUP
    signed = head >> 7 > 0
    levels = _levels(signed)
    codes = words >> _shifts(sent.device) & (1 << _BITS) - 1
    roots = (codes.float() - levels * signed) / levels
    return roots * roots.abs() * _power((head & 127).float())


def _levels(signed: Tensor) -> Tensor:
    """The largest code: where there are negative numbers half of all codes stand for them."""
    most = float((1 << _BITS) - 1)
    return torch.full_like(signed, most, dtype=torch.float32).masked_fill_(signed, most // 2)


def _power(scale: Tensor) -> Tensor:
    return torch.exp2(scale * -0.5)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, _BITS * GROUP, _BITS, device=device)
