# SPDX-License-Identifier: Apache-2.0
"""Averages of a model of another pattern: their logits may have this model's shapes.

Copies that Python makes of a model follow it.  A second model, sparsified by itself so that
averages can be written into it, follows nothing; with the same M and another N all shapes agree.
State dicts carry their pattern and are refused, as are ranks that differ.  A parameter carries
none: of a plain copy equality tells where it came from, which is an error; of an average nothing
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.run import runs

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["tell_of_foreign"]


def tell_of_foreign(weight: MaskedWeight) -> None:
    """Tell of scores that somebody wrote to since masks were drawn, of a model not trained itself.

    Only where the sole other model here with such a weight is of another pattern.  Where numbers
    that are not equal to its come from nobody can tell, so that is a warning and no error.

    Raises:
        PlanError: if the scores are a copy of those of the other model.
    """
    scores, run = weight.scores, weight.run
    if scores is None or run.step or run.advances or not weight.scores_written:
        return
    if weight.shard is not None:
        return  # the layouts would differ, too
    other = _of_another_pattern(weight, scores)
    if other is not None and not _as_at_first(weight, scores):
        if _is_copy(scores, other.scores):
            raise PlanError(
                f"{weight.name} {weight.view.shape} is masked {weight.view.nm}, and its logits are "
                f"copied from a model with masks {other.view.nm}, for which they were learnt: copy "
                "that model with copy.deepcopy, or sparsify both with the same pattern"
            )
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


def _is_copy(scores: Tensor, other: Tensor | None) -> bool:
    return other is not None and scores.device == other.device and torch.equal(scores, other)


@torch.no_grad()
def _as_at_first(weight: MaskedWeight, scores: Tensor) -> bool:
    """Whether they were put back to what they were: whoever runs a model to look at it does so."""
    blocks = weight.view.to_blocks(weight.dense.detach())
    first = weight.method.init_scores(blocks, weight.draw(0))
    return first is not None and torch.equal(first, scores.detach())
