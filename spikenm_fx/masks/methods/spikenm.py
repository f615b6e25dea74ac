# SPDX-License-Identifier: Apache-2.0
"""SpikeNM: M learnable logits a block, N draws without replacement (arXiv 2511.12097).

Read in the paper: one vector of logits per block (O(M)), N one-hot draws without replacement, an
at-most-N mask, sparse networks learnt from scratch.  The formulas of sampler and gradient, the
initialisation, the prior, the fade and every constant are our choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.eid.settings import EID
from spikenm_fx.masks.marginals import check_marginals, marginal_gradient
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.sampler import draw_mask, straight_through, top_mask
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["SpikeNM"]


@dataclass(frozen=True, slots=True)
class SpikeNM:
    """Probabilistic N:M masks with logits pi.

    Attributes:
        std: standard deviation of the initial logits.  MaskLLM (arXiv 2409.17481) has 0.01 for
            weights that rest; here they move.
        rate: how far one optimizer step moves each logit, in units of ``std``: see
            :mod:`spikenm_fx.masks.rule`.  No learning rate of the user's enters.
        relative: count the schedule's kappa in units of one over the spread of the layer's logits
            (their root mean square within the blocks).  Otherwise the learning rate and the length
            of the run decide how soon the logits outgrow the noise and the masks stop moving.
        prior: how far, in units of the logits' spread (their root mean square within the blocks), a
            weight of twice its block's mean magnitude lies above one of mean magnitude: masks are
            drawn from pi + prior * spread * (|W| / mean - 1).  Unlike MaskLLM's (eq. 10) this prior
            moves with the weights, until pi takes it in when the masks freeze.  The logits learn
            from one sample a step which weights matter; how large a weight has grown tells it too.
            0 for logits alone, as in the paper.
        decay: with a number, weights that were not drawn learn on from the straight-through
            gradient and decay by this much (SR-STE, arXiv 2102.04010, eq. 6); None lets only drawn
            weights learn (in a fade the others as much as they take part), which starves the others
            at high sparsity.
        rescale: multiply each layer's weights, once, by ||W|| / ||m * W|| with the first masks m:
            without it the layers that no norm follows start with inputs too small to spike, the
            more so the sparser they are.  Not before a fade, which starts with all weights.
        fade: of the schedule where ``total_steps`` is known and layers keep less than half of their
            weights, see :class:`~spikenm_fx.masks.schedule.Schedule`.  With 0 every training step
            is N:M, as in the paper; coming there gradually is ours, worth a point at 1:8 and
            nothing at 2:4.
        gradient: of the logits: ``"draws"``, straight through the N draws of the step, or
            ``"marginals"``, through the exact probabilities that N draws include a position, see
            :mod:`spikenm_fx.masks.marginals`.
        eid: the distillation, see :class:`~spikenm_fx.masks.eid.EID`; None for none.

    Raises:
        PlanError: for options that are no such numbers or settings.
    """

    name: ClassVar[str] = "spikenm"
    learns: ClassVar[bool] = True
    fixed: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    std: float = 0.003
    rate: float = 1.0
    relative: bool = True
    prior: float = 3.0
    decay: float | None = 2e-4
    rescale: bool = True
    fade: float = 0.6
    gradient: Literal["draws", "marginals"] = "draws"
    eid: EID | None = field(default_factory=EID)

    def __post_init__(self) -> None:
        for option in ("std", "rate", "prior", "decay", "fade"):
            value = getattr(self, option)
            if option == "decay" and value is None:
                continue
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise PlanError(f"{option}={value!r}: needs a finite number that is not negative")
        if self.gradient not in ("draws", "marginals"):
            raise PlanError(f"gradient={self.gradient!r}: known are 'draws' and 'marginals'")
        if self.eid is not None and not isinstance(self.eid, EID):
            raise PlanError(f"eid={self.eid!r}: give EID(...), its settings, or None for none")

    @property
    def moving_prior(self) -> float:
        """The attribute ``prior``, which moves with the weights."""
        return self.prior

    @property
    def step_size(self) -> float:
        """In units of the initial spread."""
        return self.rate * self.std

    def pattern(self, nm: NM) -> NM:
        """As asked for.

        Raises:
            PatternError: if its exact marginals are asked for and cannot be computed.
        """
        if self.gradient == "marginals":
            check_marginals(nm)
        return nm

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """Rising scale, then the freeze; the fade at high sparsity, where the length is known."""
        fade = self.fade if total_steps is not None and nm.density < 0.5 else 0.0
        if not self.relative:
            return Schedule(total_steps, kappa=(300.0, 1500.0), fade=fade)
        if fade:  # undrawn weights take part, so that masks may move more
            return Schedule(total_steps, kappa=(1.0, 5.0), fade=fade)
        return Schedule(total_steps)

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor:
        """Logits pi ~ N(0, std), float32 of the blocked shape."""
        assert draw.key is not None
        generator = torch.Generator(device=weight.device).manual_seed(draw.key[0] & 0xFFFFFFFF)
        logits = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        return logits.normal_(0, self.std, generator=generator)

    def logits(self, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor:
        """Pi, and until the masks freeze the prior, which moves with the weights.

        Without the - 1: what is the same for a whole block changes neither masks nor gradients.
        Weight and scores are blocks ``(lead, M, inner)``.
        """
        if not self.prior:
            return scores
        size = weight.abs().float().nan_to_num(0.0, 0.0, 0.0)  # what is not finite counts as 0
        mean = size.mean(1, keepdim=True)
        if draw.present is not None:
            mean = mean * draw.nm.of / draw.present.sum(1, keepdim=True).clamp_min(1)
        factor = (draw.prior / mean).nan_to_num(0.0, 0.0, 0.0)  # 0 for blocks of zeros
        return torch.addcmul(scores.float(), size, factor)

    def train_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """Union of N draws in each block of ``(lead, M, inner)``."""
        assert logits is not None
        return draw_mask(
            logits,
            draw.nm.keep,
            kappa=draw.kappa,
            key=draw.key,
            noise=draw.noise,
            present=draw.present,
        )

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The N largest of each block, without noise (MaskPro, arXiv 2506.12876)."""
        assert logits is not None
        return top_mask(logits, draw.nm.keep, draw.present)

    def score_grad(self, grad: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """Straight-through gradient of the shape of the logits, through draws or marginals."""
        if self.gradient == "marginals":
            mask_grad = grad.float() * weight.float()
            return marginal_gradient(
                mask_grad, logits, draw.nm.keep, kappa=draw.kappa, present=draw.present
            )
        return straight_through(
            grad,
            logits,
            draw.nm.keep,
            weight=weight,
            kappa=draw.kappa,
            tau=draw.tau,
            key=draw.key,
            noise=draw.noise,
            present=draw.present,
        )

    def remember(self, weight: Tensor, scores: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Never asked for: weight and scores, of whatever shape, are no memory."""
        raise NotImplementedError
