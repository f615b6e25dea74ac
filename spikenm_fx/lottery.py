# SPDX-License-Identifier: Apache-2.0
"""Lottery rounds around the user's own training function, with evenly loaded elements.

Train, prune a share of what is left, rewind to the initial weights, and again (Frankle & Carbin,
arXiv 1803.03635; of spiking networks arXiv 2207.01382); in each round the connections are evened
over processing elements (u-Ticket, arXiv 2302.06746).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PlanError
from spikenm_fx.fold import fold
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.masks.methods.uticket import UTicket
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.sparsify import refuse_if_sparse, sparsify
from spikenm_fx.pattern import NM, BlockView, PatternLike
from spikenm_fx.plan import LayerPlan, Plan, Rule, plan

__all__ = ["Round", "lottery_rounds"]


@dataclass(frozen=True, slots=True)
class Round:
    """One round: what was trained, and how it had been pruned.

    Attributes:
        number: from 0, the dense network.
        density: share of the planned weights that took part.
        result: what the training function returned.
    """

    number: int
    density: float
    result: Any


def lottery_rounds(
    model: nn.Module,
    train: Callable[[nn.Module, int], Any],
    nm: PatternLike = "2:4",
    *,
    density: float | None = None,
    share: float = 0.25,
    bounded: bool = True,
    pes: int = 16,
    utilisation: float | None = None,
    example_inputs: Any = None,
    rules: Iterable[Rule] = (),
    rewind_to: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> list[Round]:
    """Find a ticket of ``model`` in place: train, prune by magnitude, rewind, in rounds.

    Every round prunes ``share`` of the weights that are left, over all layers together, inside of a
    pattern that tightens with them, evens the rest over processing elements, and rewinds all
    parameters and buffers.  The last round trains what ``nm`` and ``density`` allow; ``fold`` it.

    Args:
        model: dense; afterwards masked and trained.
        train: called with the model and the number of the round; builds its own optimizer.
        nm: pattern of the last round, keep at most n of m.
        density: share of the planned weights that the last round keeps; by default all that
            ``nm`` allows, 0.02 with ``bounded=False``.
        share: of the weights left that a round prunes, in (0, 1).
        bounded: False for unstructured tickets, whatever the pattern.
        pes: P, processing elements that share the output channels.
        utilisation: that is reached where whole numbers allow it; None for the evenest.
        example_inputs: see :func:`spikenm_fx.plan`.
        rules: see :func:`spikenm_fx.plan`.
        rewind_to: state dict to rewind to, tensors of the shapes they have in ``model``; by default
            that of the model as given.
        seed: of :func:`spikenm_fx.sparsify`.

    Returns:
        one entry for each round, the dense one first.

    Raises:
        PlanError: before anything is trained, for numbers out of their ranges, a density that the
            pattern cannot hold, or a model that is sparse or cannot become it.
    """
    refuse_if_sparse(model)
    wanted = _wanted(NM.parse(nm), density, bounded)
    if not 0 < share < 1:
        raise PlanError(f"share={share}: each round prunes a share in (0, 1) of what is left")
    UTicket(pes=pes, utilisation=utilisation)  # refuses what it cannot do
    decided = plan(model, nm, example_inputs=example_inputs, rules=rules)
    start = rewind_to or model.state_dict()
    start = {name: value.detach().clone() for name, value in start.items()}
    rounds = [Round(0, 1.0, train(model, 0))]
    for number, left in enumerate(_densities(wanted, share), 1):
        _shrink_pruned(model, decided, start)
        part = _tightened(decided, left, bounded)
        method = UTicket(
            threshold=_threshold(model, part, left, bounded),
            bounded=bounded,
            pes=pes,
            utilisation=utilisation,
            exact=False,
        )
        sparsify(model, part, method=method, seed=seed)
        _rewind(model, start)
        rounds.append(Round(number, _density(model), train(model, number)))
    return rounds


def _wanted(nm: NM, density: float | None, bounded: bool) -> float:
    if density is None:
        return nm.density if bounded else 0.02
    most = nm.density if bounded else 1.0
    if not 0 < density <= most:
        raise PlanError(f"density={density}: the last round of {nm} keeps a share in (0, {most:g}]")
    return density


def _densities(wanted: float, share: float) -> list[float]:
    found = [1.0]
    while found[-1] > wanted * (1 + 1e-9):
        found.append(max(found[-1] * (1 - share), wanted))
    return found[1:] or [1.0]


def _tightened(decided: Plan, left: float, bounded: bool) -> Plan:
    """The plan with the tightest patterns of the same M that hold ``left`` of the weights."""

    def one(entry: LayerPlan) -> LayerPlan:
        if entry.nm is None or not bounded:
            return entry
        keep = min(max(math.ceil(left * entry.nm.of - 1e-9), entry.nm.keep), entry.nm.of)
        return replace(entry, nm=NM(keep, entry.nm.of))

    return replace(decided, layers=tuple(map(one, decided.layers)))


@torch.no_grad()
def _shrink_pruned(model: nn.Module, decided: Plan, start: dict[str, Tensor]) -> None:
    """Fold, and make pruned weights tiny ones, in the order of their initial magnitudes.

    So they rank behind all that is left, and evening finds the largest of them.
    """
    if not any(masked_weights(model)):
        return
    fold(model)
    for entry in decided.sparse:
        weight = entry.find(model)
        assert weight is not None
        first = start[_key(model, entry)].to(weight)
        pruned = weight == 0
        kept = weight.abs().masked_fill(pruned, torch.inf).amin()
        scale = 1e-6 * min(float(kept), 1.0) / max(float(first.abs().amax()), 1e-30)
        weight.copy_(torch.where(pruned, first * scale, weight))


def _key(model: nn.Module, entry: LayerPlan) -> str:
    """Under which the state dict has the weight of a layer, or a raw parameter."""
    is_layer = entry.name in dict(nn.Module.named_modules(model))
    return f"{entry.name}.weight".lstrip(".") if is_layer else entry.name


def _threshold(model: nn.Module, part: Plan, left: float, bounded: bool) -> float:
    """The magnitude up to which weights go, over all layers, so that ``left`` of them stay."""
    sizes, total = [], 0
    for entry in part.sparse:
        weight = entry.find(model)
        assert weight is not None
        assert entry.nm is not None
        size = weight.detach().abs().float()
        total += size.numel()
        if bounded:
            view = BlockView(entry.nm, entry.shape, entry.axis == 0, entry.groups)
            blocks = view.to_blocks(size)
            size = blocks[top_mask(blocks, entry.nm.keep, view.present(blocks.device))]
        sizes.append(size.flatten())
    pool = torch.cat(sizes)
    drop = pool.numel() - round(left * total)
    return float(pool.kthvalue(drop).values) if drop > 0 else 0.0


@torch.no_grad()
def _rewind(model: nn.Module, start: dict[str, Tensor]) -> None:
    """All parameters and buffers as they were; masks stay."""
    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for name, value in start.items():
        if name in own:
            own[name].copy_(value)


def _density(model: nn.Module) -> float:
    masks = list({id(mask): mask.mask for _, _, mask in masked_weights(model)}.values())
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
