# SPDX-License-Identifier: Apache-2.0
"""Eligibility-inspired distillation (EID): temporal credits as soft targets of the mask logits.

Read in the paper (arXiv 2511.12097, abstract): temporally accumulated credits become block-wise
soft targets that align the mask probabilities with the spiking dynamics, which reduces the
sampling variance.  Formulas, credit, normalisation, strength and rhythm are our choices; the
measurements behind the defaults are in ``spikenm_fx/bench/results/``.

* credit C of each synapse from a running average over refreshes, every ``every`` optimizer steps;
* target q = softmax(C / mean of the block / temperature) in each block;
* KL(q || p) with p = softmax(kappa * pi) has the gradient p - q on kappa * pi: closed form, no
  sampling noise, bounded.  It is added to the logits' gradient in their backward pass, so that the
  user's loss and loop do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PlanError
from spikenm_fx.pattern import planes

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight
    from spikenm_fx.masks.methods import Draw

__all__ = ["EID", "Credit", "Guide", "eid_loss", "soft_targets"]

Credit = Literal["eligibility", "weight*eligibility", "weight*rate", "weight"]
"""E; |W| * E; |W| * sqrt(firing rate) (Wanda for spikes); |W|."""


@dataclass(frozen=True, slots=True)
class EID:
    """Settings of the distillation.

    Attributes:
        credit: what the targets are made of; see :data:`Credit`.
        every: optimizer steps from one refresh of the credits to the next.
        ema: share of the old average that a refresh keeps; the first one sets it.
        weight: first and last strength, linear over the steps before the freeze (the first one
            where the run's length is unknown).  In units of the root mean square of the layer's
            own logit gradient, so that it means the same under any loss scale, optimizer and model.
        temperature: T_e of the targets; small ones are sharp.
        normalise: divide a block's credits by their ``"mean"``, or make them ``"zscore"``.
        automatic: False leaves the gradient to :func:`eid_loss` in the user's own loss.
    """

    credit: Credit = "weight*eligibility"
    every: int = 20
    ema: float = 0.8
    weight: tuple[float, float] = (0.1, 0.1)
    temperature: float = 1.0
    normalise: Literal["mean", "zscore"] = "mean"
    automatic: bool = True

    def __post_init__(self) -> None:
        if self.credit not in get_args(Credit):
            raise PlanError(f"credit={self.credit!r}: known are {list(get_args(Credit))}")
        if self.every < 1 or not 0 <= self.ema < 1 or not self.temperature > 0:
            raise PlanError(
                f"EID(every={self.every}, ema={self.ema}, temperature={self.temperature}): needs "
                "every >= 1, 0 <= ema < 1 and temperature > 0"
            )
        if self.normalise not in ("mean", "zscore") or min(self.weight) < 0:
            raise PlanError(
                f"EID(normalise={self.normalise!r}, weight={self.weight}): normalise is 'mean' or "
                "'zscore', weights are not negative"
            )

    @property
    def needs_neuron(self) -> bool:
        """Whether the credit is defined only where a neuron follows the layer."""
        return "eligibility" in self.credit

    @property
    def needs_input(self) -> bool:
        """Whether the credit looks at activations at all."""
        return self.credit != "weight"


def soft_targets(
    credit: Tensor,
    present: Tensor | None,
    temperature: float,
    normalise: Literal["mean", "zscore"] = "mean",
) -> Tensor:
    """Q = softmax(normalised credit / temperature) over each block.

    Args:
        credit: ``(lead, M, inner)``, finite.
        present: bool ``(lead, M, 1)``, False at padded positions, which get q = 0; or None.
        temperature: T_e.
        normalise: see :class:`EID`.

    Returns:
        q of the same shape; uniform in a block whose credits are all equal, zeros included.
    """
    values = planes(credit if credit.dtype == torch.float64 else credit.float())
    if present is None:
        mean = values.mean(0)
    else:
        there = present.movedim(1, 0).to(values.dtype)
        count = there.sum(0).clamp_min(1)
        mean = (values * there).sum(0) / count
    if normalise == "zscore":
        values.sub_(mean)
        if present is None:
            mean = values.square().mean(0).sqrt()
        else:
            mean = ((values * there).square().sum(0) / count).sqrt()
    values.div_((mean + (mean == 0)) * temperature)
    if present is not None:
        values.masked_fill_(~present.movedim(1, 0), -torch.inf)
    return torch.softmax(values, 0).nan_to_num_().movedim(0, 1)


class Measured(Protocol):
    """Whoever watches a layer."""

    def measure(self) -> Tensor | None:
        """Its credit in this step, of the weight's shape."""


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
        self._targets: Tensor | None = None  # of credits that do not follow the weight

    def due(self, step: int) -> bool:
        """Whether the credits are to be refreshed in this optimizer step."""
        return step % self.settings.every == 0 and self.refreshed != step

    def load(self, average: Tensor | None) -> None:
        """Take over (or forget) an average; all zeros mean that there was none."""
        known = average is not None and bool(average.any())
        self.average = average.detach().clone().float() if known and average is not None else None
        self.refreshed, self._targets = -1, None

    def stored(self, owner: MaskedWeight) -> Tensor:
        """What a checkpoint keeps: the average, zeros before the first refresh."""
        if self.average is None:
            return torch.zeros(owner.view.shape, device=owner.dense.device)
        return self.average.to(owner.dense.device)

    @torch.no_grad()
    def refresh(self, owner: MaskedWeight, step: int) -> None:
        """Average in the credits of this step, if they are due and known."""
        if not self.due(step):
            return
        self.refreshed = step
        credit = self.observed.measure() if self.observed is not None else None
        if credit is None or not bool(torch.isfinite(credit).all()) or not bool(credit.any()):
            return  # overflow, or a layer that nothing reached: keep what is known
        credit = credit.float()
        if self.average is None:
            self.average = credit.clone()
        else:
            self.average = self.average.to(credit.device).lerp(credit, 1 - self.settings.ema)
        self._targets = None

    def targets(self, owner: MaskedWeight) -> Tensor | None:
        """Q in blocks, with the weights of now; None before the first refresh."""
        credit = self.average
        if self.settings.needs_input and credit is None:
            return None
        if credit is not None and credit.device != owner.dense.device:
            credit = self.average = credit.to(owner.dense.device)
        if self.settings.credit.startswith("weight"):
            size = owner.dense.detach().abs().float()
            credit = size if credit is None else size * credit
        elif self._targets is not None:
            return self._targets
        assert credit is not None
        self._targets = soft_targets(
            owner.view.to_blocks(credit),
            owner.view.present(credit.device),
            self.settings.temperature,
            self.settings.normalise,
        )
        return self._targets

    @torch.no_grad()
    def pull(self, owner: MaskedWeight, grad: Tensor, draw: Draw, logits: Tensor) -> Tensor:
        """Add weight * rms(grad) * (p - q) to the gradient of the logits.

        Args:
            owner: of the logits.
            grad: task gradient ``(lead, M, inner)``; it may be overwritten.
            draw: of the forward pass.
            logits: what its mask was drawn from.
        """
        strength = self.strength(owner)
        targets = self.targets(owner) if self.settings.automatic and strength else None
        if targets is None or owner.scores is None:
            return grad
        p = probabilities(logits, draw)
        return grad.add_(p.sub_(targets).mul_(strength * _rms(grad)))

    def strength(self, owner: MaskedWeight) -> float:
        """The weight of this step."""
        first, last = self.settings.weight
        return first + (last - first) * owner.schedule.progress(owner.clock.step)


def _rms(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.div(max(values.numel(), 1) ** 0.5)


def probabilities(logits: Tensor, draw: Draw) -> Tensor:
    """The sampling distribution softmax(kappa * pi) in blocks, 0 at padded positions."""
    return torch.softmax(planes(_scaled(logits, draw)), 0).movedim(0, 1)


def _scaled(logits: Tensor, draw: Draw) -> Tensor:
    scaled = logits.float() * draw.kappa
    if draw.present is not None:
        scaled = scaled.masked_fill(~draw.present, torch.finfo(torch.float32).min)
    return scaled


def eid_loss(model: nn.Module) -> Tensor:
    """Sum over the layers of the mean over their blocks of KL(q || softmax(kappa * pi)).

    For those who want the distillation in their own loss: sparsify with
    ``SpikeNM(eid=EID(automatic=False))`` and add it.  Its gradient on kappa * pi is (p - q) over
    the number of blocks.

    Args:
        model: a sparsified model, between forward and backward of a training step.

    Returns:
        a scalar; 0 before the first refresh and for methods without EID.
    """
    from spikenm_fx.masks.attach import masked_weights

    total = torch.zeros(())
    owners = {id(mask): mask for _, _, mask in masked_weights(model)}
    for owner in owners.values():
        if owner.guide is None or owner.scores is None:
            continue
        step = owner.clock.step
        owner.guide.refresh(owner, step)
        q = owner.guide.targets(owner)
        if q is None:
            continue
        draw = owner.draw(step)
        logits = owner.logits(draw)
        assert logits is not None
        log_p = torch.log_softmax(_scaled(logits, draw), 1)
        blocks = max(q.shape[0] * q.shape[2], 1)
        divergence = torch.special.xlogy(q, q) - q * log_p
        loss: Tensor = divergence.sum() / blocks
        total = total.to(loss.device) + loss
    return total
