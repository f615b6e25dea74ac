# SPDX-License-Identifier: Apache-2.0
"""u-Ticket: lottery tickets that load processing elements evenly (arXiv 2302.06746).

Read in the paper (abstract): sparse SNNs leave processing elements idle, down to 59 % utilisation
at 98 % sparsity; the connections are monitored and adjusted during the pruning of lottery tickets,
up to full utilisation.  What moves where is our reading, as is the bound of N:M.  The rounds around
a training function are those of :func:`spikenm_fx.lottery.lottery_rounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.balance import evened
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.pattern import NM

__all__ = ["UTicket"]


@dataclass(frozen=True, slots=True)
class UTicket(FixedRule):
    """The largest weights at the moment of ``sparsify``, evened over processing elements, for good.

    Inside of N:M a ticket keeps at most N of M.  Where it keeps exactly N of every block, each
    output channel has the same number of connections, and there is nothing to even: an exact N:M
    layer has utilisation 1 by construction.

    Attributes:
        density: share of the layer's weights that stay, 0 < density <= 1; None for all that the
            pattern allows.
        threshold: magnitudes up to it are pruned, too: lottery rounds prune globally by it.
        bounded: False for the unstructured ticket of the paper, whatever the pattern.
        pes: P, processing elements that share the output channels.
        utilisation: mean over maximum of the connections of each round of P channels that is
            reached at least; None for the evenest that whole numbers allow, 0 for no evening.
        exact: False to take the evenest also where whole numbers do not allow the utilisation.

    Raises:
        PlanError: for numbers out of their ranges, and at ``sparsify`` for a utilisation or a
            density that cannot be met.
    """

    name: ClassVar[str] = "uticket"
    density: float | None = None
    threshold: float = 0.0
    bounded: bool = True
    pes: int = 16
    utilisation: float | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise PlanError(f"density={self.density}: the share that stays must be in (0, 1]")
        if self.utilisation is not None and not 0 <= self.utilisation <= 1:
            raise PlanError(
                f"utilisation={self.utilisation}: mean over maximum work is at most 1; give a "
                "number in [0, 1], or None for the evenest"
            )
        if self.pes < 1 or not self.threshold >= 0:
            raise PlanError(
                f"pes={self.pes}, threshold={self.threshold}: needs pes >= 1 and a threshold that "
                "is not negative"
            )

    def pattern(self, nm: NM) -> NM:
        """As asked for; M:M, which binds nothing, where the ticket is not bounded.

        Raises:
            PlanError: if the pattern cannot hold the density.
        """
        if not self.bounded:
            return NM(nm.of, nm.of)
        if self.density is not None and self.density > nm.density:
            raise PlanError(
                f"density={self.density} is more than {nm} can hold ({nm.density:g}): ask for "
                "less, for another pattern, or for bounded=False"
            )
        return nm

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """The ticket: magnitudes of what stays, float32 ``(lead, M, inner)``, zeros elsewhere.

        Raises:
            PlanError: if the utilisation cannot be met.
        """
        assert draw.view is not None
        size = weight.abs().float()
        mask = top_mask(size, draw.nm.keep, draw.present) & (size > self.threshold)
        if self.density is not None:
            mask &= _largest(
                size.masked_fill(~mask, 0.0), round(self.density * math.prod(draw.view.shape))
            )
        if self.utilisation != 0:
            mask = self._evened(mask, size, draw)
        # what stays must be told from what is pruned, also where its weight is zero
        return torch.where(mask, size.clamp_min(torch.finfo(torch.float32).tiny), 0.0)

    def _evened(self, mask: Tensor, size: Tensor, draw: Draw) -> Tensor:
        """Blocks to rows of output channels, evened, and back; nothing grows where nothing is."""
        assert draw.view is not None
        if draw.present is not None:
            size = size.masked_fill(~draw.present, -torch.inf)
        rows = draw.view.rows(mask), draw.view.rows(size)
        even = evened(*rows, draw.nm.keep, self.pes, self.utilisation, self.exact)
        return draw.view.from_rows(even)

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The ticket, bool ``(lead, M, inner)``."""
        assert logits is not None
        return logits > 0


def _largest(size: Tensor, count: int) -> Tensor:
    """Of all values, of any shape, the ``count`` largest that are not zero."""
    flat = size.flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(min(count, flat.numel())).indices] = True
    return chosen.view(size.shape) & (size > 0)
