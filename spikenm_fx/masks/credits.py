# SPDX-License-Identifier: Apache-2.0
"""What a sparsified and trained model has learnt of its weights, for those who order channels."""

from __future__ import annotations

from torch import Tensor, nn

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.attach import masked_weights

__all__ = ["learnt_credits"]


def learnt_credits(model: nn.Module) -> dict[str, Tensor]:
    """What a sparsified and trained model has learnt of its weights: |W| times its EID credits.

    Weights without credits (another method, before the first refresh) are left out.  Give it to
    ``permute(dense, ..., score=...)`` of the dense model that was sparsified.

    Raises:
        PlanError: if no weight of the model has credits.
    """
    found = {
        name: (mask.values.abs() * mask.guide.average.abs()).float().cpu()
        for name, _, mask in masked_weights(model)
        if mask.guide is not None and mask.guide.average is not None
    }
    if not found:
        raise PlanError(
            f"{type(model).__name__} holds no learnt credits: sparsify it with method 'spikenm', "
            "train it, and ask before fold"
        )
    return found
