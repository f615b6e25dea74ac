# SPDX-License-Identifier: Apache-2.0
"""First masks: of a model just sparsified, of loaded weights, of weights initialised anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spikenm_fx.masks.update import draw_masks

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["loaded", "restart", "start"]


def start(mask: MaskedWeight) -> None:
    """Draw the first mask of a weight, and scale the weight to it where the method asks so."""
    if mask.method.fixed:
        _fix(mask)
    else:
        draw_masks([mask], mask.run.step)
    keep_norm(mask)


@torch.no_grad()
def restart(mask: MaskedWeight) -> None:
    """Start the scores anew, after other dense weights came."""
    blocks = mask.view.to_blocks(mask.dense.detach())
    fresh = mask.method.init_scores(blocks, mask.draw(0))
    if mask.scores is not None and fresh is not None:
        mask.scores.data.copy_(fresh)
    mask.momentum = None
    if mask.guide is not None:
        mask.guide.load(None)
    start(mask)


@torch.no_grad()
def loaded(mask: MaskedWeight, *, restart_scores: bool = False, knows_prior: bool = True) -> None:
    """Weights, and mostly scores, were loaded: their masks follow.

    Args:
        mask: of which weight.
        restart_scores: whether a dense model was loaded before training began.
        knows_prior: whether the strength of the moving prior came along.
    """
    if restart_scores:
        restart(mask)
        return
    frozen = mask.learns and mask.frozen
    if mask.prior is not None and not knows_prior and frozen:
        mask.prior.data.zero_()  # its logits had taken the prior in
    if mask.method.fixed:
        _fix(mask)
    else:
        mask.settled = False
        draw_masks([mask], mask.run.step, follow_prior=not knows_prior)


def _fix(mask: MaskedWeight) -> None:
    draw = mask.draw(None)
    blocks = mask.view.to_blocks(mask.dense.detach())
    scores = None if mask.scores is None else mask.scores.detach()
    mask.mask.copy_(mask.view.from_blocks(mask.method.final_mask(blocks, scores, draw)))
    mask.after_step(mask.schedule.undrawn_at(mask.run.step))


@torch.no_grad()
def keep_norm(mask: MaskedWeight) -> None:
    """Scale the weight so that what the first masks keep is as large as all of it was.

    Only if the method asks for it, and not before a fade, which starts with all of it.
    """
    if not mask.method.rescale or mask.schedule.undrawn_at(0):
        return
    if mask.dense.is_inference():
        return  # it may not be written to
    whole, part = (
        torch.linalg.vector_norm(w.detach().float()) for w in (mask.dense, mask.final_weight())
    )
    factor = whole / part
    if torch.isfinite(factor) and torch.isfinite(mask.dense * factor).all():
        # .data: a state left from an earlier forward may hold a graph through this weight; and
        # not in place: the values may be those of a checkpoint that was loaded by assigning
        mask.dense.data = mask.dense.data * factor.to(mask.dense.dtype)
