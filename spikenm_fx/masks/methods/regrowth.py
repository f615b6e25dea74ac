# SPDX-License-Identifier: Apache-2.0
"""What was pruned comes back in place of what is kept: one exchange in a block, N stays N."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exchanged", "strongest_blocks"]


def exchanged(mask: Tensor, value: Tensor, growth: Tensor, present: Tensor | None = None) -> Tensor:
    """The mask after one exchange in each block: the least of the kept for the best of the pruned.

    Args:
        mask: bool ``(lead, M, inner)``.
        value: of the kept ones; the smallest goes, the last one where several are smallest.
        growth: of the pruned ones; the largest comes, the first one where several are largest.
            Where no pruned one has a growth above zero the block stays as it is.
        present: bool ``(lead, M, 1)``, False where nothing can come; or None.
    """
    free = ~mask if present is None else ~mask & present
    best, comes = growth.masked_fill(~free, -torch.inf).max(1, keepdim=True)
    backwards = value.masked_fill(~mask, torch.inf).flip(1).argmin(1, keepdim=True)
    goes = mask.shape[1] - 1 - backwards
    wanted = (best > 0) & mask.any(1, keepdim=True)
    new = mask.scatter(1, goes, mask.gather(1, goes) & ~wanted)
    return new.scatter(1, comes, new.gather(1, comes) | wanted)


def strongest_blocks(growth: Tensor, share: float) -> Tensor:
    """The growth in the share of blocks that have most of it, zeros in the others.

    Args:
        growth: ``(lead, M, inner)``, zeros where nothing is to come.
        share: of the blocks, rounded down.
    """
    best = growth.amax(1, keepdim=True)
    count = int(share * best.numel())
    chosen = torch.zeros(best.numel(), dtype=torch.bool, device=growth.device)
    chosen[best.flatten().topk(count).indices] = True
    return growth * chosen.view(best.shape)
