# SPDX-License-Identifier: Apache-2.0
"""Reading a mask: which pattern it obeys, how its blocks are filled, how evenly it loads PEs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikenm_fx.pattern import NM, BlockView, WeightLayer, tightest

__all__ = ["PES", "MaskTile", "block_histogram", "detect_pattern", "mask_tile", "pe_utilisation"]

PES = 16
"""Processing elements that share the output channels, unless told otherwise."""

_WHOLE = NM(1, 1)
_PATTERNS = tuple(NM(keep, of) for of in (2, 4, 8, 16, 32) for keep in range(1, of))


def detect_pattern(layer: WeightLayer, mask: Tensor) -> NM | None:
    """The tightest N:M that the zeros of a weight obey, or None where no block size helps.

    Args:
        layer: Linear, Conv or ConvTranspose.
        mask: non-zero where the weight is, of the weight's shape.
    """
    if not mask.any():
        return None
    view = BlockView.of_layer(layer, _WHOLE)
    return tightest(mask, _PATTERNS, transposed=view.transposed, groups=view.groups)


def block_histogram(layer: WeightLayer, mask: Tensor, nm: NM) -> tuple[int, ...]:
    """How many blocks hold 0, 1, ..., ``of`` non-zeros.

    Args:
        layer: Linear, Conv or ConvTranspose.
        mask: non-zero where the weight is, of the weight's shape.
        nm: the pattern that cuts it into blocks.
    """
    counts = (BlockView.of_layer(layer, nm).to_blocks(mask) != 0).sum(1).flatten()
    return tuple(int(n) for n in torch.bincount(counts, minlength=nm.of + 1))


def pe_utilisation(layer: WeightLayer, mask: Tensor, pes: int = PES) -> float:
    """Mean over maximum work of ``pes`` PEs that each take one output channel at a time.

    Work is the number of non-zero weights; PEs wait for the slowest of their round, as in
    Workload-Balanced Pruning (u-Ticket, arXiv 2302.06746).  1 means no PE ever waits.

    Args:
        layer: Linear, Conv or ConvTranspose.
        mask: non-zero where the weight is, of the weight's shape.
        pes: processing elements.
    """
    rows = (BlockView.of_layer(layer, _WHOLE).output_major(mask) != 0).flatten(1).sum(1)
    rounds = [part for part in rows.split(pes) if int(part.max()) > 0]
    busy = sum(int(part.sum()) for part in rounds)
    reserved = sum(int(part.max()) * part.numel() for part in rounds)
    return busy / reserved if reserved else 1.0


@dataclass(frozen=True, slots=True)
class MaskTile:
    """The top left corner of a mask at one kernel position, for drawing.

    Attributes:
        rows: one string of ``0`` and ``1`` per output channel, along the input channels.
        of: block size, to draw the borders.
    """

    rows: tuple[str, ...]
    of: int


def mask_tile(
    layer: WeightLayer, mask: Tensor, of: int, *, outputs: int = 24, inputs: int = 48
) -> MaskTile:
    """The corner of ``outputs`` x ``inputs`` channels at the kernel's centre.

    Args:
        layer: Linear, Conv or ConvTranspose.
        mask: non-zero where the weight is, of the weight's shape.
        of: block size.
        outputs: rows at most.
        inputs: columns at most.
    """
    matrix: Tensor = BlockView.of_layer(layer, _WHOLE).output_major(mask)
    for size in reversed(matrix.shape[2:]):
        matrix = matrix[..., size // 2]
    corner = (matrix[:outputs, :inputs] != 0).int()
    return MaskTile(tuple("".join(map(str, row)) for row in corner.tolist()), of)
