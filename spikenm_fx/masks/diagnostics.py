# SPDX-License-Identifier: Apache-2.0
"""What a researcher asks of learnt masks, as data; nothing here runs unless it is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.masks.eid import probabilities
from spikenm_fx.masks.layer import MaskedWeight
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.state import preserved

__all__ = ["MaskDiagnostics", "diagnose", "flip_rate", "logit_noise"]


@dataclass(frozen=True, slots=True)
class MaskDiagnostics:
    """The state of one layer's masks.

    Attributes:
        layer: qualified name.
        flips: share of the kept weights that two draws of neighbouring steps do not share; 0 for
            methods whose masks move with the weights alone.
        entropy: of the sampling distribution softmax(kappa * pi), over log M; None without logits.
        agrees_with_magnitude: share of the final mask that is among the N largest weights.
        agrees_with_eid: share of the final mask that is among the N largest credits; None where
            there are no credits.
    """

    layer: str
    flips: float
    entropy: float | None
    agrees_with_magnitude: float
    agrees_with_eid: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def diagnose(model: nn.Module) -> list[MaskDiagnostics]:
    """Diagnostics of every mask, at the present step.

    Args:
        model: a sparsified model.
    """
    return [_of(name, mask) for name, mask in _masks(model)]


def _masks(model: nn.Module) -> list[tuple[str, MaskedWeight]]:
    seen: dict[int, tuple[str, MaskedWeight]] = {}
    for name, _, mask in masked_weights(model):
        seen.setdefault(id(mask), (name, mask))
    return list(seen.values())


def _of(name: str, mask: MaskedWeight) -> MaskDiagnostics:
    step = mask.clock.step
    final = mask.mask()
    size = mask.dense.detach().abs()
    targets = mask.guide.targets(mask) if mask.guide is not None else None
    return MaskDiagnostics(
        layer=name,
        flips=flip_rate(mask.mask(step), mask.mask(step + 1)),
        entropy=_entropy(mask),
        agrees_with_magnitude=_shared(final, _top(mask, mask.view.to_blocks(size))),
        agrees_with_eid=None if targets is None else _shared(final, _top(mask, targets)),
    )


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Share of the positions kept ``before`` that are not kept ``after``."""
    return 1.0 - _shared(before, after)


def _shared(mask: Tensor, other: Tensor) -> float:
    return float((mask & other).sum() / mask.sum().clamp_min(1))


def _top(mask: MaskedWeight, blocks: Tensor) -> Tensor:
    present = mask.view.present(blocks.device)
    return mask.view.from_blocks(top_mask(blocks, mask.view.nm.keep, present))


def _entropy(mask: MaskedWeight) -> float | None:
    draw = mask.draw(mask.clock.step)
    logits = mask.logits(draw)
    if logits is None or not mask.method.learns or logits.shape != mask.view.blocked_shape:
        return None
    p = probabilities(logits.detach(), draw)
    entropy = torch.special.entr(p).sum(1).mean()
    return float(entropy) / max(math.log(mask.view.nm.of), 1e-12)


def logit_noise(
    model: nn.Module, backward: Callable[[], object], *, draws: int = 8
) -> dict[str, dict[str, float]]:
    """Variance of the logits' gradient over mask draws on the same batch, with and without EID.

    Args:
        model: a sparsified model in training mode, with logits; afterwards it is as before.
        backward: computes a loss of the model and calls ``backward()`` on it.
        draws: how many masks to draw.

    Returns:
        by layer: ``{"with_eid": v, "without_eid": v}`` where v is the total variance over the
        squared norm of the mean gradient (noise to signal; infinite where the mean is 0).
    """
    masks = [(name, mask) for name, mask in _masks(model) if mask.method.learns]
    guides = [mask.guide for _, mask in masks]
    result: dict[str, dict[str, float]] = {name: {} for name, _ in masks}
    try:
        for key, active in (("with_eid", guides), ("without_eid", [None] * len(guides))):
            for (_, mask), guide in zip(masks, active, strict=True):
                mask.guide = guide
            for name, value in _noise(model, masks, backward, draws).items():
                result[name][key] = value
    finally:
        for (_, mask), guide in zip(masks, guides, strict=True):
            mask.guide = guide
    return result


def _noise(
    model: nn.Module,
    masks: list[tuple[str, MaskedWeight]],
    backward: Callable[[], object],
    draws: int,
) -> dict[str, float]:
    samples: dict[str, list[Tensor]] = {name: [] for name, _ in masks}
    clocks = {id(mask.clock): mask.clock for _, mask in masks}.values()
    before = [(clock, clock.seed, clock.settle()) for clock in clocks]
    try:
        with preserved(model) as restore:
            for draw in range(draws):
                restore()
                for clock, seed, step in before:
                    clock.set(seed=seed + 1 + draw, step=step)
                for _, mask in masks:
                    mask._cache = None
                    if mask.scores is not None:
                        mask.scores.grad = None
                backward()
                for name, mask in masks:
                    grad = None if mask.scores is None else mask.scores.grad
                    if grad is not None:
                        samples[name].append(grad.detach().clone())
    finally:
        for clock, seed, step in before:
            clock.set(seed=seed, step=step)
        for _, mask in masks:
            mask._cache = None
    return {name: _ratio(torch.stack(grads)) for name, grads in samples.items() if grads}


def _ratio(samples: Tensor) -> float:
    signal = float(samples.mean(0).square().sum())
    return float(samples.var(0).sum()) / signal if signal > 0 else math.inf
