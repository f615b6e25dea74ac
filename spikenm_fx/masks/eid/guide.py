# SPDX-License-Identifier: Apache-2.0
"""The running credits of one masked weight, and the targets made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from spikenm_fx.masks.eid.settings import EID
from spikenm_fx.masks.eid.targets import soft_targets
from spikenm_fx.masks.eid.together import mean_over_ranks, usable
from spikenm_fx.masks.fingerprint import compare, fingerprint, summed, told_apart
from spikenm_fx.masks.schedule import Schedule

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["Guide", "refresh_together", "targets_of"]


class Measured(Protocol):
    """Whoever watches a layer."""

    def measure(self) -> Tensor | None:
        """Its credit in this step, of the weight's shape."""

    def close(self, step: int) -> None:
        """Look at no further forward of this step."""

    @property
    def sees(self) -> bool:
        """Whether there is anything that could be measured."""


class Guide:
    """The running credits of one masked weight, and the pull on its logits that comes of them.

    Attributes:
        settings: the EID settings.
        average: running credit without the factor |W|, of the weight's shape, float32; None before
            the first refresh.
        refreshed: the optimizer step of the last refresh, -1 before.
        observed: measures at a refresh what the hooks saw: the credit without the factor |W|, or
            None where they saw nothing.
    """

    def __init__(self, settings: EID, observed: Measured | None) -> None:
        self.settings = settings
        self.average: Tensor | None = None
        self.refreshed = -1
        self.observed = observed

    def close(self, step: int) -> None:
        """A backward pass reached the weight: further forwards of this step are not looked at."""
        if self.observed is not None:
            self.observed.close(step)

    def due(self, step: int) -> bool:
        """Whether the credits are to be refreshed in this optimizer step."""
        return step % self.settings.every == 0 and self.refreshed != step

    def load(self, average: Tensor | None) -> None:
        """Take over (or forget) an average; all zeros mean that there was none."""
        known = average is not None and bool(average.any())
        self.average = average.detach().clone().float() if known and average is not None else None
        self.refreshed = -1

    def stored(self, owner: MaskedWeight) -> Tensor:
        """What a checkpoint keeps: the average, zeros before the first refresh."""
        if self.average is None:
            return torch.zeros(owner.view.shape, dtype=torch.float32, device=owner.mask.device)
        return self.average.to(owner.mask.device)

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Average in the credits of this step, if they are due and known."""
        if self.due(step):
            self._take(self._look(step))

    def _look(self, step: int) -> Tensor | None:
        """What this step's forward passes left; None where nothing did."""
        self.refreshed = step
        return self.observed.measure() if self.observed is not None else None

    def _take(self, credit: Tensor | None, known: Tensor | None = None) -> None:
        """Average in a credit; ``known``: whether it is usable, if that was found out before."""
        if credit is None:
            return
        credit = credit.float()
        good = usable(credit) if known is None else known
        if credit.device.type != "cpu":  # without waiting for the device
            credit = torch.where(good, credit, 0.0 if self.average is None else self.average)
        elif not good.numpy():
            return  # overflow, or a layer that nothing reached: keep what is known
        if self.average is None:
            self.average = credit.clone()
        else:
            self.average = self.average.to(credit.device).lerp(credit, 1 - self.settings.ema)

    @property
    def known(self) -> bool:
        """Whether there is anything to make targets of."""
        return self.average is not None or not self.settings.needs_input

    def targets(self, owner: MaskedWeight) -> Tensor | None:
        """Q in blocks, with the weights of now; None before the first refresh."""
        if not self.known:
            return None
        present = owner.view.present(owner.mask.device)
        size = owner.view.to_blocks(owner.values)
        average = None if self.average is None else owner.view.to_blocks(self.average)
        return targets_of(self.settings, size, average, present)

    def strength(self, schedule: Schedule, step: int) -> float:
        """The weight of the pull at ``step``; 0 where there is none."""
        if not self.known or not self.settings.automatic:
            return 0.0
        first, last = self.settings.weight
        return first + (last - first) * schedule.progress(step)


@torch.no_grad()
def refresh_together(owners: Sequence[MaskedWeight], ranks: Any) -> None:
    """Refresh the credits of several weights, of all ranks of a data parallel model together.

    One collective over all weights gives every rank the mean credit.

    Args:
        owners: of the credits, of one run, the same and in the same order on every rank.
        ranks: a process group; None where there is only this process.

    Raises:
        PlanError: on every rank, if they differ in steps, seeds or masks.
    """
    if not owners:
        return
    step = owners[0].run.rhythm
    due = [(owner, owner.guide) for owner in owners if owner.guide and owner.guide.due(step)]
    _refresh_parts([(owner, guide) for owner, guide in due if owner.shard is not None], step)
    due = [(owner, guide) for owner, guide in due if owner.shard is None]
    found: Sequence[Tensor | None] = [guide._look(step) for _, guide in due]
    if ranks is not None and any(guide.settings.needs_input for _, guide in due):
        found = mean_over_ranks([owner for owner, _ in due], found, ranks)
    for (_, guide), credit in zip(due, found, strict=True):
        guide._take(credit)


def _refresh_parts(due: Sequence[tuple[MaskedWeight, Guide]], step: int) -> None:
    """The same of sharded weights: each rank receives the credits of its part, layer by layer."""
    parts, good, owners = [], [], []
    for owner, guide in due:
        credit, shard = guide._look(step), owner.shard
        if guide.observed is None or not guide.observed.sees or shard is None:
            continue
        if credit is None:
            credit = torch.zeros(owner.whole.shape, dtype=owner.dense.dtype, device=_device(owner))
        seen = usable(credit)
        own = _to_send(torch.where(seen, credit, 0.0), shard.mesh.size())
        parts.append(shard.sum_parts(own).to(credit.dtype))
        good.append(seen)
        owners.append((owner, guide))
    if not owners:
        return
    shard = owners[0][0].shard
    assert shard is not None
    run, ranks = owners[0][0].run, shard.mesh.size()
    own = summed(fingerprint(run, [owner for owner, _ in owners])).to(good[0].device)
    counts, tokens = shard.all_reduce(torch.cat((torch.stack(good).double(), own))).split(
        [len(good), len(own)]
    )
    compare(run, told_apart(tokens, ranks))
    for (owner, guide), part, count in zip(owners, parts, counts, strict=True):
        part = (part / count.clamp_min(1)).to(owner.mask.device)
        guide._take(part, (count > 0).to(part.device))


def _device(owner: MaskedWeight) -> torch.device:
    """Where a sharded layer computes: with CPU offload not where its part is kept."""
    assert owner.shard is not None
    kind = owner.shard.mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


_MOST_IN_HALF = 64  # a sum of so many is off by a percent or two at most, one alone by 0.2 %


def _to_send(credits: Tensor, ranks: int) -> Tensor:
    """Credits as ranks add them up: in bfloat16, which has the range of float32 and half its bytes.

    They are estimates by the samples of one step, and only their ratios within a block matter.
    Credits of float64 models stay exact.
    """
    exact = credits.dtype == torch.float64 or ranks > _MOST_IN_HALF
    return credits if exact else credits.to(torch.bfloat16)


def targets_of(
    settings: EID, weight: Tensor, average: Tensor | None, present: Tensor | None
) -> Tensor:
    """The targets of blocks ``(lead, M, inner)``, from their weights and average credits."""
    credit = average
    if settings.credit.startswith("weight"):
        size = weight.abs().float()
        credit = size if credit is None else size * credit
    assert credit is not None
    return soft_targets(credit, present, settings.temperature, settings.normalise)
