# SPDX-License-Identifier: Apache-2.0
"""Averages of a model of another pattern: their logits may have this model's shapes.

Copies that Python makes of a model follow it.  A second model, sparsified by itself so that
averages can be written into it, follows nothing; with the same M and another N all shapes agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx.masks.run import runs

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["tell_of_foreign"]


def tell_of_foreign(weight: MaskedWeight) -> None:
    """Warn of scores that somebody wrote to since masks were drawn, of a model not trained itself.

    Only where the sole other model here with such a weight is of another pattern: where the numbers
    come from nobody can tell, so it is a warning and no error.
    """
    scores, run = weight.scores, weight.run
    if scores is None or run.step or run.advances or not weight.scores_written:
        return
    if weight.shard is not None:
        return  # the layouts would differ, too
    other = _of_another_pattern(weight, scores)
    if other is not None and not _as_at_first(weight, scores):
        run.warn(
            "foreign",
            f"{weight.name} {weight.view.shape} is masked {weight.view.nm}, and its logits were "
            f"written to; the only other model here with such logits has masks {other.view.nm}. If "
            "they are an average or a copy of its logits, the masks are those of neither: make the "
            "copy with copy.deepcopy(model), or sparsify both with the same pattern",
        )
    weight.forget_writing()


def _of_another_pattern(weight: MaskedWeight, scores: Tensor) -> MaskedWeight | None:
    """The same weight of another model here, if there are such but none with this pattern."""
    same = [
        other
        for run in runs()
        if run is not weight.run
        for other in run.weights
        if other.there
        and other.name == weight.name
        and other.scores is not None
        and other.scores.shape == scores.shape
    ]
    if any(other.view.nm == weight.view.nm for other in same):
        return None
    return next(iter(same), None)


@torch.no_grad()
def _as_at_first(weight: MaskedWeight, scores: Tensor) -> bool:
    """Whether they were put back to what they were: whoever runs a model to look at it does so."""
    blocks = weight.view.to_blocks(weight.dense.detach())
    first = weight.method.init_scores(blocks, weight.draw(0))
    return first is not None and torch.equal(first, scores.detach())
