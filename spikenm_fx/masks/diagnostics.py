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
from spikenm_fx.masks.eid.targets import probabilities
from spikenm_fx.masks.layer import MaskedWeight
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.update import draw_masks, gradients
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
    step = mask.run.step
    final = mask.final()
    size = mask.values.abs()
    targets = mask.guide.targets(mask) if mask.guide is not None else None
    return MaskDiagnostics(
        layer=name,
        flips=_flips(mask, step),
        entropy=_entropy(mask),
        agrees_with_magnitude=_shared(final, _top(mask, mask.view.to_blocks(size))),
        agrees_with_eid=None if targets is None else _shared(final, _top(mask, targets)),
    )


def flip_rate(before: Tensor, after: Tensor) -> float:
    """Share of the positions kept ``before`` and not ``after``, two bool masks of one shape."""
    return 1.0 - _shared(before, after)


def _shared(mask: Tensor, other: Tensor) -> float:
    return float((mask & other).sum() / mask.sum().clamp_min(1))


def _top(mask: MaskedWeight, blocks: Tensor) -> Tensor:
    present = mask.view.present(blocks.device)
    return mask.view.from_blocks(top_mask(blocks, mask.view.nm.keep, present))


def _entropy(mask: MaskedWeight) -> float | None:
    draw = mask.draw(mask.run.step)
    logits = mask.logits(draw)
    if logits is None or not mask.learns or logits.shape != mask.view.blocked_shape:
        return None
    p = probabilities(logits.detach(), draw)
    entropy = torch.special.entr(p).sum(1).mean()
    return float(entropy) / max(math.log(mask.view.nm.of), 1e-12)


def _flips(mask: MaskedWeight, step: int) -> float:
    """Between two draws from what weight and scores hold now."""
    if mask.frozen or not mask.learns:
        return 0.0
    blocks = mask.view.to_blocks(mask.values)
    draws = [mask.draw(step), mask.draw(step + 1)]
    found = [mask.method.train_mask(blocks, mask.logits(draw), draw) for draw in draws]
    return flip_rate(*found)


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
    masks = [(name, mask) for name, mask in _masks(model) if mask.learns and not mask.frozen]
    samples: dict[str, dict[str, list[Tensor]]] = {
        name: {"with_eid": [], "without_eid": []} for name, _ in masks
    }
    run = masks[0][1].run if masks else None
    seed, step = (0, 0) if run is None else (run.seed, run.step)
    kept = [(mask.mask.clone(), mask.undrawn) for _, mask in masks]
    grads = [(p, p.grad) for p in nn.Module.parameters(model)]
    try:
        with preserved(model) as restore:
            for draw in range(draws if run is not None else 0):
                assert run is not None
                restore()
                run.seed = seed + 1 + draw
                draw_masks([mask for _, mask in masks], step)
                for parameter, _ in grads:
                    parameter.grad = None
                backward()
                for name, mask in masks:
                    if mask.dense.grad is None:
                        continue
                    task, pulled = gradients(mask, step)
                    samples[name]["without_eid"].append(task)
                    samples[name]["with_eid"].append(pulled)
    finally:
        if run is not None:
            run.seed = seed
        for (_, mask), (before, undrawn) in zip(masks, kept, strict=True):
            mask.mask.copy_(before)
            mask.after_step(undrawn)
        for parameter, grad in grads:
            parameter.grad = grad
    return {
        name: {key: _ratio(torch.stack(found)) for key, found in each.items() if found}
        for name, each in samples.items()
    }


def _ratio(samples: Tensor) -> float:
    signal = float(samples.mean(0).square().sum())
    return float(samples.var(0).sum()) / signal if signal > 0 else math.inf
