# SPDX-License-Identifier: Apache-2.0
"""MaskLLM: one logit for each of the C(M, N) candidate masks of a block (arXiv 2409.17481)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from spikenm_fx.errors import PatternError
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.noise import gumbel
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import NM

__all__ = ["MaskLLM"]

_MOST_CANDIDATES = 1024  # 4:16 has 1820: beyond, memory is better spent on M logits


@dataclass(frozen=True, slots=True)
class MaskLLM:
    """Gumbel-softmax over the candidate masks; scores are ``(lead, C(M, N), inner)``.

    Two differences to the paper, so that every step is N:M: the forward mask is the drawn
    candidate (hard) with the soft one behind it in the backward pass, and weights train as well.

    Attributes:
        std: of the initial logits (Table 7 there).
        prior: strength alpha of the magnitude mask as prior (eq. 10).
    """

    name: ClassVar[str] = "maskllm"
    learns: ClassVar[bool] = True
    fixed: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    decay: ClassVar[None] = None
    rescale: ClassVar[bool] = False
    relative: ClassVar[bool] = False
    moving_prior: ClassVar[float] = 0.0
    std: float = 0.01
    prior: float = 3.0

    @property
    def step_size(self) -> float:
        """A third of the initial spread, which the first optimizer steps then overcome."""
        return self.std / 3

    def pattern(self, nm: NM) -> NM:
        """As asked for.

        Raises:
            PatternError: where C(M, N) candidates are too many.
        """
        candidates = math.comb(nm.of, nm.keep)
        if candidates > _MOST_CANDIDATES:
            raise PatternError(
                f"maskllm at {nm} needs {candidates} logits per block of {nm.of} weights, at most "
                f"{_MOST_CANDIDATES} are allowed; method='spikenm' needs {nm.of}"
            )
        return nm

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """Scale 1e2 -> 5e2 and temperature 4 -> 0.05, linearly (Table 7), then the freeze."""
        return Schedule(total_steps, kappa=(100.0, 500.0), tau=(4.0, 0.05))

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """N(0, std), raised by the overlap with the magnitude mask (eq. 9 and 10)."""
        candidates = _candidates(draw.nm, weight.device)
        assert draw.key is not None
        generator = torch.Generator(device=weight.device).manual_seed(draw.key[0] & 0xFFFFFFFF)
        shape = (weight.shape[0], len(candidates), weight.shape[2])
        logits = torch.empty(shape, dtype=torch.float32, device=weight.device)
        logits.normal_(0, self.std, generator=generator)
        prior = top_mask(weight.abs(), draw.nm.keep, draw.present).float()
        overlap = torch.einsum("lmi,cm->lci", prior, candidates) - draw.nm.keep / 2
        return logits.add_(overlap, alpha=self.std * self.prior)

    def logits(self, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor:
        """The scores themselves: one of each candidate mask of a block, ``(lead, C, inner)``."""
        return scores

    def train_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The candidate that wins under Gumbel noise (eq. 5)."""
        assert logits is not None
        return _chosen(_perturbed(logits, draw), draw)

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The most probable candidate (Algorithm 1)."""
        assert logits is not None
        return _chosen(logits, draw)

    def score_grad(self, grad: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """Through the softmax over candidates (eq. 6 and 7)."""
        # candidates first: sums over a few neighbours in memory take several times as long
        soft = torch.softmax(_first(_perturbed(logits, draw)).div_(draw.tau), 0)
        loss = _first(grad.float() * weight.float())
        grad_soft = (_candidates(draw.nm, logits.device) @ loss.flatten(1)).view_as(soft)
        mean = (soft * grad_soft).sum(0)
        found = soft.mul_(grad_soft.sub_(mean)).movedim(0, 1).contiguous()
        return found.mul_(draw.kappa / draw.tau)

    def remember(self, weight: Tensor, scores: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Never asked for: weight and scores, of whatever shape, are no memory."""
        raise NotImplementedError


def _first(blocks: Tensor) -> Tensor:
    """``(lead, K, inner)`` as ``(K, lead, inner)``, in new memory."""
    return blocks.movedim(1, 0).clone(memory_format=torch.contiguous_format)


def _perturbed(logits: Tensor, draw: Draw) -> Tensor:
    noise = draw.noise
    if noise is None:
        assert draw.key is not None
        noise = gumbel(logits, draw.key)
    return noise + logits.float() * draw.kappa


def _chosen(values: Tensor, draw: Draw) -> Tensor:
    candidates = _candidates(draw.nm, values.device)
    values = torch.nan_to_num(values.float(), nan=-math.inf)
    if draw.present is not None:  # a candidate that keeps what is absent would keep fewer than N
        left = torch.einsum("lmi,cm->lci", draw.present.float(), candidates)
        values = values.masked_fill(left < left.amax(1, keepdim=True), -math.inf)
    masks = candidates.bool()[values.argmax(1)].movedim(-1, 1)
    return masks if draw.present is None else masks & draw.present


def _candidates(nm: NM, device: torch.device) -> Tensor:
    """All masks with N of M ones, ``(C, M)`` float."""
    rows = list(combinations(range(nm.of), nm.keep))
    index = torch.tensor(rows, device=device)
    zeros = torch.zeros(len(rows), nm.of, dtype=torch.float32, device=device)
    return zeros.scatter_(1, index, 1.0)
