# SPDX-License-Identifier: Apache-2.0
"""Counter-based noise: (seed, step, layer name, index) determine every number.

No generator state exists that could be lost, saved or consumed: a resumed run, a recomputed
activation checkpoint and every data-parallel rank see the same draw, on any thread count.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["Key", "gumbel", "gumbel_", "noise_key"]

Key = tuple[int, int]
"""Two signed 32-bit words."""

_WEYL = -0x61C88647  # 2^32 / golden ratio, as signed int32: spreads neighbouring counters
_MIX1, _MIX2 = 0x7FEB352D, -0x7B935975  # multipliers of the lowbias32 integer hash
_UNIT = 2.0**-23


def noise_key(seed: int, step: int, name: str) -> Key:
    """The key of one draw: a hash of the run's seed, the optimizer step and the layer's name."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )


def gumbel_(out: Tensor, key: Key, start: int, bits: Tensor, shifted: Tensor) -> Tensor:
    """Fill ``out`` with standard Gumbel noise, -log(-log u), of the counters from ``start`` on.

    Args:
        out: contiguous float32 tensor; element i receives the noise of counter ``start + i``.
        key: of :func:`noise_key`.
        start: first counter.
        bits: int32 work space of as many elements.
        shifted: the same again.
    """
    end = start + out.numel()
    torch.arange(start, end, out=bits)
    # the lowbias32 integer hash of a Weyl sequence, with one half of the key before and one inside
    _xor_shift_(bits.mul_(_WEYL).add_(key[0]), 16, shifted).mul_(_MIX1).bitwise_xor_(key[1])
    _xor_shift_(bits, 15, shifted).mul_(_MIX2)
    _xor_shift_(bits, 16, shifted)
    # 23 bits at half-integer offsets: u is never 0 or 1, both logarithms are finite
    out.copy_(bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).view(out.shape))
    return out.add_(0.5).mul_(_UNIT).log_().neg_().log_().neg_()


def gumbel(like: Tensor, key: Key) -> Tensor:
    """Fresh standard Gumbel noise of the shape of ``like``, float32, of the counters from 0 on."""
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    bits, shifted = torch.empty(2, like.numel(), dtype=torch.int32, device=like.device)
    return gumbel_(out, key, 0, bits, shifted)


def _xor_shift_(bits: Tensor, shift: int, shifted: Tensor) -> Tensor:
    """Xor ``bits`` with itself shifted right; the mask makes the arithmetic shift a logical one."""
    torch.bitwise_right_shift(bits, shift, out=shifted)
    return bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
