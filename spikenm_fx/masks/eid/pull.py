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


def pull(
    group: Group, weights: Tensor, logits: Tensor, draw: Draw, step: int
) -> tuple[Tensor, Tensor] | None:
    """``p - q`` in blocks and its strength, one a row: the pull is their product.

    Args:
        group: whose logits are pulled.
        weights: of the group, in blocks, ``(lead, M, inner)``.
        logits: what the masks of this step were drawn from, of that shape.
        draw: with which.
        step: the optimizer step.

    Returns:
        ``(lead, M, inner)`` and ``(lead, 1, 1)``, or None where no member has credits.
    """
    members = group.members
    strengths = [0.0 if m.guide is None else m.guide.strength(m.schedule, step) for m in members]
    if not any(strengths):
        return None
    guide = next(m.guide for m in members if m.guide is not None)
    average = None
    if guide.settings.needs_input:
        found = [member.credits for member in members]
        none = torch.zeros((), dtype=torch.float32, device=group.device)
        average = group.blocks(
            [
                none.expand(m.view.shape) if one is None else one
                for m, one in zip(members, found, strict=True)
            ]
        )
    q = targets_of(guide.settings, weights, average, draw.present)
    return probabilities(logits, draw) - q, group.rows(group.numbers(strengths))
