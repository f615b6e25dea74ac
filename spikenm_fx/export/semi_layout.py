# SPDX-License-Identifier: Apache-2.0
"""2:4 matrices in the layout of NVIDIA's sparse tensor cores, and back, on any device.

A block of four consecutive columns of a row becomes its two kept values and a nibble: the
position of the first in the lower two bits, that of the second in the upper two.  Nibbles are
gathered into words of 16 bits (float16, bfloat16) or 32 bits (int8), and the words are laid out
anew as the tensor cores load them (CUTLASS, ``ColumnMajorInterleaved<2>``).  :func:`compress` is
torch's own conversion behind a check; :func:`expand` is written from the layout, independently, as
its oracle: torch's own expansion changes float32 values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spikenm_fx._torch import semi_structured_compress
from spikenm_fx.errors import ExportError
from spikenm_fx.pattern import NM, BlockView

__all__ = ["MULTIPLES", "compress", "expand", "padded", "too_full"]

MULTIPLES = {
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.int8: (32, 128),
}
"""Rows and columns come in multiples of these, in CUTLASS and cuSPARSELt alike, by dtype."""

_PATTERN = NM(2, 4)


def too_full(matrix: Tensor) -> int:
    """Blocks of more than two non-zeros.

    Args:
        matrix: ``(rows, columns)``, columns in multiples of 4.
    """
    blocks = BlockView(_PATTERN, tuple(matrix.shape)).to_blocks(matrix)
    return int(((blocks != 0).sum(1) > _PATTERN.keep).sum())


def padded(matrix: Tensor) -> Tensor:
    """Zeros below and to the right, up to the vendor's multiples.

    Args:
        matrix: ``(rows, columns)`` of a dtype of :data:`MULTIPLES`.
    """
    rows, columns = MULTIPLES[matrix.dtype]
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    return F.pad(matrix, missing).contiguous()


def compress(matrix: Tensor, name: str = "the matrix") -> tuple[Tensor, Tensor]:
    """Kept values and positions of a 2:4 matrix.

    Args:
        matrix: ``(rows, columns)``, padded, of a dtype of :data:`MULTIPLES`.
        name: for the message.

    Returns:
        Values ``(rows, columns / 2)`` and words of positions.

    Raises:
        ExportError: where a block holds more than two non-zeros, which torch's conversion drops;
            for another dtype.
    """
    if matrix.dtype not in MULTIPLES:
        raise ExportError(
            f"{name} {tuple(matrix.shape)} is {str(matrix.dtype).removeprefix('torch.')}: sparse "
            "tensor cores take 2:4 in float16, bfloat16 and int8 (float32 is 1:2 there, and half "
            "of a 2:4 weight would be lost); name one of them as dtype"
        )
    full = too_full(matrix)
    if full:
        raise ExportError(
            f"{name} {tuple(matrix.shape)}: {full} blocks hold more than 2 of 4 non-zeros; fold a "
            "model that is 2:4 there"
        )
    return semi_structured_compress(matrix)


def expand(values: Tensor, positions: Tensor) -> Tensor:
    """The dense matrix, bit by bit.

    Args:
        values: ``(rows, columns / 2)``.
        positions: words, ``(rows, words)`` as :func:`compress` gives them.

    Returns:
        ``(rows, columns)`` of the values' dtype.
    """
    rows, words = positions.shape
    nibbles = 4 if positions.dtype == torch.int16 else 8
    in_order = positions.flatten()[_places(rows, words, nibbles, positions.device)]
    shifts = 4 * torch.arange(nibbles, device=positions.device)
    nibble = (in_order.to(torch.int64).reshape(rows, words, 1) >> shifts) & 15
    where = torch.stack([nibble & 3, nibble >> 2], dim=-1).reshape(rows, -1, 2)
    blocks = values.new_zeros((rows, where.shape[1], 4))
    return blocks.scatter_(2, where, values.reshape(rows, -1, 2)).reshape(rows, -1)


def _places(rows: int, words: int, nibbles: int, device: torch.device) -> Tensor:
    """Where the word of each row and column lies: int64 ``[rows * words]``."""
    interleaved = 16 // nibbles  # rows of 8 that share a group: 4 of 16-bit words, 2 of 32-bit ones
    group = 8 * interleaved
    row = torch.arange(rows, device=device)
    row = row // group * group + row % 8 * interleaved + row % group // 8
    row = row[:, None].expand(rows, words)
    column = torch.arange(words, device=device).expand(rows, words)
    crossed = (row ^ column) & 1  # of each 2 x 2 words the off-diagonal ones change places
    row, column = row ^ crossed, column ^ crossed
    return (column // 2 * (2 * rows) + 2 * row + column % 2).flatten()
