# SPDX-License-Identifier: Apache-2.0
"""First masks: of a model just sparsified, of loaded weights, of weights initialised anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.methods import Draw, kept
from spikenm_fx.masks.piece import rows_of
from spikenm_fx.masks.shard import total, whole_of
from spikenm_fx.masks.update import draw_masks
from spikenm_fx.pattern import not_finite

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["initial_scores", "loaded", "restart", "start"]


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
    fresh = initial_scores(mask)
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


def initial_scores(mask: MaskedWeight) -> Tensor | None:
    """What scores begin with, of the part that this rank holds; None for a method without.

    They are made of the whole weight, one layer at a time, so that ranks begin as one process does.

    Returns:
        In blocks, ``(lead, M, inner)``.

    Raises:
        PlanError: if the method cannot do with such a weight.
    """
    weight = whole_of(mask.dense.detach())
    draw = Draw(
        mask.whole.nm,
        key=mask.key_at(0),
        present=mask.whole.present(weight.device),
        total_steps=mask.schedule.total_steps,
        view=mask.whole,
    )
    try:
        scores = mask.method.init_scores(mask.whole.to_blocks(weight), draw)
    except PlanError as error:
        raise PlanError(f"{mask.name} {mask.whole.shape}: {error}") from error
    return scores if mask.shard is None or scores is None else mask.shard.part_of_scores(scores)


def _square(mask: MaskedWeight, parts: Iterable[Tensor]) -> Tensor:
    """The sum of squares over the whole weight, float64 ``[1]``, of the parts that are here."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return total([mask], torch.stack(norms).square_().sum().view(1))


def _fix(mask: MaskedWeight) -> None:
    draw = mask.draw(None)
    blocks = mask.view.to_blocks(mask.values)
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
    values, final = mask.values, mask.final()
    sums = [
        _square(mask, (part for (part,) in rows_of(values))),
        _square(mask, (kept(part, there) for part, there in rows_of(values, final))),
    ]
    factor = (sums[0] / sums[1]).sqrt().float()
    if mask.shard is not None:
        if torch.isfinite(factor):
            mask.values.mul_(factor.to(mask.dense.dtype))
        return
    scaled = mask.dense.data * factor.to(mask.dense.dtype)
    if torch.isfinite(factor) and not not_finite(scaled):
        # .data: a state left from an earlier forward may hold a graph through this weight; and
        # not in place: the values may be those of a checkpoint that was loaded by assigning
        mask.dense.data = scaled
