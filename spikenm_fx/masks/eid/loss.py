# SPDX-License-Identifier: Apache-2.0
"""The distillation as a term of the user's own loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.masks.eid.targets import scaled

__all__ = ["eid_loss"]


def eid_loss(model: nn.Module) -> Tensor:
    """Sum over the layers of the mean over their blocks of KL(q || softmax(kappa * pi)).

    For those who want the distillation in their own loss: sparsify with
    ``SpikeNM(eid=EID(automatic=False))`` and add it.  Its gradient on kappa * pi is (p - q) over
    the number of blocks.

    Args:
        model: a sparsified model, between forward and backward of a training step.  Its logits'
            gradient from this loss joins the one that masks get from the task.

    Returns:
        a scalar; 0 before the first refresh and for methods without EID.
    """
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    owners = {id(mask): mask for _, _, mask in masked_weights(model)}
    for owner in owners.values():
        if owner.guide is None or owner.scores is None:
            continue
        step = owner.run.step
        owner.guide.refresh(step)
        q = owner.guide.targets(owner)
        if q is None:
            continue
        draw = owner.draw(step)
        logits = owner.logits(draw)
        assert logits is not None
        log_p = torch.log_softmax(scaled(logits, draw), 1)
        blocks = max(q.shape[0] * q.shape[2], 1)
        divergence = torch.special.xlogy(q, q) - q * log_p
        loss: Tensor = divergence.sum() / blocks
        total = total.to(loss.device) + loss
    return total
