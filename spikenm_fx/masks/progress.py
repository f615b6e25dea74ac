# SPDX-License-Identifier: Apache-2.0
"""Where the masks of a model stand: for progress bars and logs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PlanError, no_module
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["Phase", "Progress", "progress"]

Phase = Literal["fading", "annealing", "frozen"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What :func:`progress` tells.

    Attributes:
        step: optimizer steps that the masks have seen; of an average (EMA, SWA) those of the model
            that it follows.
        total_steps: of the whole run, or None where its length is not known.
        phase: ``"fading"`` while undrawn weights still take part, ``"annealing"`` while masks are
            searched with falling noise (for good where ``total_steps`` is None), ``"frozen"`` once
            they stay.  Of layers in different phases the earliest.
        changed: share of the mask positions of training that are others than when ``progress`` was
            asked of this model before, or than at its first masks.
    """

    step: int
    total_steps: int | None
    phase: Phase
    changed: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total = "" if self.total_steps is None else f"/{self.total_steps}"
        return f"step {self.step}{total}, {self.phase}, {self.changed:.2%} of positions changed"


@torch.no_grad()
def progress(model: nn.Module) -> Progress:
    """Step, phase and how much the masks move; changes nothing of the run.

    It waits for the device, and keeps a copy of the masks for the next question: ask it now and
    then, not at each step.

    Args:
        model: a sparsified model.

    Raises:
        PlanError: if ``model`` is not sparse.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(no_module("progress", model))
    masks = list({id(mask): mask for _, _, mask in masked_weights(model)}.values())
    if not masks:
        raise PlanError(
            f"{type(model).__name__} has no masks; call spikenm_fx.sparsify(model) first"
        )
    step = max(mask.run.shown_step for mask in masks)
    for mask in masks:
        mask.run.look()
    phases = [_phase(mask, mask.run.shown_step) for mask in masks]
    order: tuple[Phase, ...] = ("fading", "annealing", "frozen")
    totals = [m.schedule.total_steps for m in masks if m.schedule.total_steps is not None]
    return Progress(
        step=step,
        total_steps=max(totals) if len(totals) == len(masks) else None,
        phase=min(phases, key=order.index),
        changed=_changed(masks),
    )


def _phase(mask: MaskedWeight, step: int) -> Phase:
    if mask.schedule.undrawn_at(step) > 0:
        return "fading"
    if mask.method.fixed or (mask.learns and mask.schedule.frozen(step)):
        return "frozen"
    return "annealing"


def _changed(masks: list[MaskedWeight]) -> float:
    changed, total = 0, 0
    for mask in masks:
        before: Tensor | None = mask.asked
        if before is not None and before.shape == mask.mask.shape:
            changed += int((before.to(mask.mask.device) != mask.mask).sum())
        total += mask.mask.numel()
        mask.asked = mask.mask.clone()
    return changed / max(total, 1)
