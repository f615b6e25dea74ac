# SPDX-License-Identifier: Apache-2.0
"""What EID adds to the logits' gradient: closed form, no sampling noise, bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx.masks.eid.guide import targets_of
from spikenm_fx.masks.eid.targets import probabilities
from spikenm_fx.masks.methods import Draw

if TYPE_CHECKING:
    from spikenm_fx.masks.groups import Group

__all__ = ["pull"]


def pull(group: Group, weights: Tensor, logits: Tensor, draw: Draw, step: int) -> Tensor | None:
    """``strength * (p - q)`` in blocks; None where no member has credits.

    Args:
        group: whose logits are pulled.
        weights: of the group, in blocks.
        logits: what the masks of this step were drawn from.
        draw: with which.
        step: the optimizer step.
    """
    members = group.members
    strengths = [0.0 if m.guide is None else m.guide.strength(m.schedule, step) for m in members]
    if not any(strengths):
        return None
    guide = next(m.guide for m in members if m.guide is not None)
    average = None
    if guide.settings.needs_input:
        found = [None if m.guide is None else m.guide.average for m in members]
        zeros = torch.zeros_like
        average = group.blocks(
            [
                zeros(m.dense.detach(), dtype=torch.float32) if one is None else one
                for m, one in zip(members, found, strict=True)
            ]
        )
    q = targets_of(guide.settings, weights, average, draw.present)
    return (probabilities(logits, draw) - q) * group.rows(group.numbers(strengths))
