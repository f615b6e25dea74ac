# SPDX-License-Identifier: Apache-2.0
"""SD-SNN: spines that widen and shrink, pruning of the least used, regeneration (arXiv 2211.12219).

Read in the authors' code: a range of each synapse that widens by overshoot after K epochs beyond
it, shrinks by a quarter after K epochs of falling magnitude, and clamps the weight; pruning of the
neurons with the smallest ranges; regeneration of pruned synapses whose evidence stays above a
percentile for more than K epochs.  An epoch is an interval of ``every`` optimizer steps here.  That
evidence is the magnitude that a pruned weight, which learns on, has come to, and everything that
puts it inside of N:M, is our reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.masks.methods.regrowth import exchanged
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["Regrow"]

_SHRINK = 0.75
_INTERVALS = 60  # of a run whose length is known; with patience 2 about the share of K=18 of 600
_OPEN = 100  # steps of an interval where it is not
_PLANES = ("low", "high", "over", "under", "falling", "before", "evidence", "alive")


@dataclass(frozen=True, slots=True)
class Regrow(FixedRule):
    """Masks that lose their least used synapses to pruned ones that insist.

    The scores hold eight planes of the weight's size: bounds of the range, how long the weight has
    been beyond them or falling, its magnitude before, how long a pruned one has insisted, and the
    mask itself.

    Attributes:
        structure: ``"block"``, inside of N:M: a block that regenerates a position gives up its kept
            one of the smallest range.  ``"neuron"``, as published: all synapses of the output
            neurons with the smallest ranges go, and pruned ones come back, whatever the pattern.
        patience: K, intervals that something must last.
        every: optimizer steps of an interval; by default a sixtieth of ``total_steps``, 100 where
            that is not known.
        percentile: of the layer's magnitudes, above which a pruned weight is evidence; it rises by
            ``1.1 ** interval`` up to 99.
        rate: of ``"neuron"``: share of the neurons left that the first pruning takes; later ones
            take exp(-interval / 5) of it.

    Raises:
        PlanError: for numbers out of their ranges, and at ``sparsify`` for a run too short to
            regenerate anything.
    """

    name: ClassVar[str] = "regrow"
    fixed: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    structure: Literal["block", "neuron"] = "block"
    patience: int = 2
    every: int | None = None
    percentile: float = 65.0
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.structure not in ("block", "neuron"):
            raise PlanError(f"structure={self.structure!r}: known are 'block' and 'neuron'")
        if self.patience < 1 or (self.every is not None and self.every < 1):
            raise PlanError(f"patience={self.patience}, every={self.every}: both must be 1 or more")
        if not 0 <= self.percentile < 99 or not 0 <= self.rate < 1:
            raise PlanError(
                f"percentile={self.percentile}, rate={self.rate}: needs 0 <= percentile < 99 and "
                "0 <= rate < 1"
            )

    @property
    def decay(self) -> float:
        """0: pruned weights learn on, which is the evidence for them, and do not decay."""
        return 0.0

    def pattern(self, nm: NM) -> NM:
        """As asked for; M:M, all that whole neurons leave, for ``"neuron"``."""
        return nm if self.structure == "block" else NM(nm.of, nm.of)

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """Nothing to anneal or freeze.

        Raises:
            PlanError: if the run ends before anything can be regenerated.
        """
        shortest = (3 * self.patience + 2) * self.interval(total_steps)
        if total_steps is not None and total_steps < shortest:
            raise PlanError(
                f"every={self.interval(total_steps)} and patience={self.patience} in a run of "
                f"total_steps={total_steps}: the first regeneration comes after {shortest} "
                "optimizer steps, so train longer, or with shorter intervals or less patience"
            )
        return Schedule(total_steps)

    def interval(self, total_steps: int | None) -> int:
        """Optimizer steps of an interval."""
        if self.every is not None:
            return self.every
        return _OPEN if total_steps is None else max(total_steps // _INTERVALS, 1)

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """The planes, float32 ``(lead, 8 * M, inner)``: range -/+ max |W|, mask by magnitude."""
        size = weight.abs().float()
        widest = size.amax().expand(size.shape) if size.numel() else size
        zeros = torch.zeros_like(size)
        mask = top_mask(size, draw.nm.keep, draw.present).float()
        return torch.cat([-widest, widest, zeros, zeros, zeros, size, zeros, mask], 1)

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The mask that is remembered, bool ``(lead, M, inner)``."""
        assert logits is not None
        return logits.chunk(len(_PLANES), 1)[-1] > 0

    def remember(self, weight: Tensor, scores: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """At the end of an interval: ranges move, weights are clamped, masks change.

        Shapes as of the protocol.
        """
        assert draw.step is not None
        every = self.interval(draw.total_steps)
        if (draw.step + 1) % every:
            return weight, scores
        epoch = (draw.step + 1) // every
        planes = dict(zip(_PLANES, scores.chunk(len(_PLANES), 1), strict=True))
        w = weight.float()
        planes |= self._moved_ranges(w, planes)
        if epoch > self.patience:
            w = torch.maximum(torch.minimum(w, planes["high"]), planes["low"])
        if epoch > 2 * self.patience:
            planes |= self._moved_masks(w, planes, epoch - 2 * self.patience - 1, draw)
        return w.to(weight.dtype), torch.cat([planes[name] for name in _PLANES], 1)

    def _moved_ranges(self, w: Tensor, planes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Widened by the overshoot where the weight was beyond, shrunk where it fell, K times."""
        low, high, size = planes["low"], planes["high"], w.abs()
        over = torch.where(w >= high, planes["over"] + 1, 0.0)
        under = torch.where(w <= low, planes["under"] + 1, 0.0)
        falling = torch.where(size < planes["before"], planes["falling"] + 1, 0.0)
        up, down, shrink = (count >= self.patience for count in (over, under, falling))
        high = torch.where(up, w, torch.where(shrink, high * _SHRINK, high))
        low = torch.where(down, w, torch.where(shrink, low * _SHRINK, low))
        return {
            **{"low": low, "high": high, "before": size},
            "over": over.masked_fill(up, 0.0),
            "under": under.masked_fill(down, 0.0),
            "falling": falling.masked_fill(shrink, 0.0),
        }

    def _moved_masks(
        self, w: Tensor, planes: dict[str, Tensor], interval: int, draw: Draw
    ) -> dict[str, Tensor]:
        alive, size = planes["alive"] > 0, w.abs()
        insists = ~alive & (size > self._bar(size, interval)) & (size > 0)
        evidence = torch.where(insists, planes["evidence"] + 1, 0.0)
        back = evidence > self.patience
        spread = planes["high"] - planes["low"]
        if self.structure == "block":
            alive = exchanged(alive, spread, size * back, draw.present)
        else:
            alive = self._without_neurons(alive, spread, interval, draw) | back
        return {"alive": alive.float(), "evidence": evidence.masked_fill(alive, 0.0)}

    def _bar(self, size: Tensor, interval: int) -> Tensor:
        """The magnitude at the percentile of the layer."""
        share = min(self.percentile + 1.1 ** min(interval, 99), 99.0) / 100
        flat = size.flatten()
        return flat.kthvalue(max(math.ceil(share * flat.numel()), 1)).values

    def _without_neurons(self, alive: Tensor, spread: Tensor, interval: int, draw: Draw) -> Tensor:
        """Those of the smallest sum of ranges, among the output neurons that are left."""
        assert draw.view is not None
        rows = draw.view.rows(alive * spread).flatten(1).sum(1)
        left = rows > 0
        count = int(float(left.sum()) * self.rate * math.exp(-interval / 5))
        least = rows.masked_fill(~left, torch.inf).topk(count, largest=False).indices
        kept = draw.view.rows(alive).clone()
        kept[least] = False
        return draw.view.from_rows(kept)
