# SPDX-License-Identifier: Apache-2.0
"""Averages of a model of another pattern: their logits may have this model's shapes.

Copies that Python makes of a model follow it.  A second model, sparsified by itself so that
averages can be written into it, follows nothing; with the same M and another N all shapes agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.run import runs

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["refuse_foreign"]


def refuse_foreign(weight: MaskedWeight) -> None:
    """Look at scores that somebody wrote to since masks were drawn, of a model not trained itself.

    Raises:
        PlanError: if they can only come from a model of another pattern.
    """
    scores, run = weight.scores, weight.run
    if scores is None or run.step or run.advances or not weight.scores_written:
        return
    if weight.shard is not None:
        return  # the layouts would differ, too
    other = _of_another_pattern(weight, scores)
    if other is None or _as_at_first(weight, scores):
        weight.forget_writing()
        return
    raise PlanError(
        f"{weight.name} {weight.view.shape} is masked {weight.view.nm}, but the logits of a model "
        f"with masks {other.view.nm} were written into it (an average, a copy): its masks would be "
        "those of neither. Make the copy with copy.deepcopy(model), or sparsify both with the same "
        "pattern"
    )


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
