# SPDX-License-Identifier: Apache-2.0
"""Counter-based noise: (seed, step, layer name, index) determine every number.

No generator state exists that could be lost, saved or consumed: a resumed run, a recomputed
activation checkpoint and every data-parallel rank see the same draw, on any thread count; a rank
that holds some rows of a weight starts counting at the first of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Key", "gumbel", "gumbel_of_layers", "gumbel_of_runs", "noise_key"]

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


def gumbel(like: Tensor, key: Key, start: int = 0) -> Tensor:
    """Fresh standard Gumbel noise, -log(-log u), of the shape of ``like``; float32.

    Args:
        like: for its shape and device.
        key: of :func:`noise_key`.
        start: the counter of the first element; the others count on in the order of its shape.
    """
    bits = torch.arange(start, start + like.numel(), dtype=torch.int32, device=like.device)
    return _gumbel(bits.mul_(_WEYL).add_(key[0]), key[1]).view(like.shape)


def gumbel_of_layers(
    counts: Sequence[int],
    keys: Sequence[Key],
    device: torch.device,
    starts: Sequence[int] | None = None,
) -> Tensor:
    """The noise of many layers, one after the other, in as few operations as that of one.

    Args:
        counts: numbers that each layer needs.
        keys: of each layer.
        device: where to make them.
        starts: the first counter of each layer; 0 where none are given.

    Returns:
        float32 ``[sum(counts)]``; the part of a layer is :func:`gumbel` of its key, bit by bit.
    """
    if len(counts) == 1:
        like = torch.empty((), dtype=torch.float32, device=device).expand(counts[0])
        return gumbel(like, keys[0], starts[0] if starts else 0)
    total, offset, words = sum(counts), 0, []
    for count, key, start in zip(counts, keys, starts or [0] * len(counts), strict=True):
        words.append((_int32(key[0] + _WEYL * (start - offset)), key[1], count))
        offset += count
    on_host = torch.tensor(words, dtype=torch.int32, device="cpu").view(-1, 3).t().contiguous()
    if device.type == "cuda":  # from pinned memory the copy waits for nothing
        on_host = on_host.pin_memory()
    numbers = on_host.to(device, non_blocking=True)
    spread = numbers[:2].repeat_interleave(numbers[2], dim=1, output_size=total)
    first, second = spread.unbind()
    bits = torch.arange(total, dtype=torch.int32, device=device).mul_(_WEYL).add_(first)
    return _gumbel(bits, second)


def gumbel_of_runs(
    start: int, runs: int, run: int, stride: int, key: Key, device: torch.device
) -> Tensor:
    """The noise of a part of a layer: of runs of neighbouring elements, a stride apart.

    Args:
        start: the counter of the first element.
        runs: how many runs there are.
        run: the length of each.
        stride: from the first element of a run to that of the next.
        key: of the layer.
        device: where to make it.

    Returns:
        float32 ``[runs, run]``; each number is that of :func:`gumbel` at its counter, bit by bit.
    """
    first = torch.arange(runs, dtype=torch.int64, device=device).mul_(stride).add_(start)
    bits = first.to(torch.int32)[:, None] + torch.arange(run, dtype=torch.int32, device=device)
    return _gumbel(bits.mul_(_WEYL).add_(key[0]), key[1])


def _gumbel(bits: Tensor, key1: int | Tensor) -> Tensor:
    """Hash a Weyl sequence (lowbias32, half of the key before, half inside), and make it Gumbel."""
    bits = _xor_shift(bits, 16).mul_(_MIX1).bitwise_xor_(key1)
    bits = _xor_shift(bits, 15).mul_(_MIX2)
    bits = _xor_shift(bits, 16)
    # 23 bits at half-integer offsets: u is never 0 or 1, both logarithms are finite
    unit = bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).to(torch.float32)
    return unit.add_(0.5).mul_(_UNIT).log_().neg_().log_().neg_()


def _xor_shift(bits: Tensor, shift: int) -> Tensor:
    """Xor ``bits`` with itself shifted right; the mask makes the arithmetic shift a logical one."""
    shifted = torch.bitwise_right_shift(bits, shift).bitwise_and_((1 << (32 - shift)) - 1)
    return bits.bitwise_xor_(shifted)


def _int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
