# SPDX-License-Identifier: Apache-2.0
"""A plan that mixes patterns under a budget of bytes or synaptic operations.

Each layer gets one of several patterns so that as much as possible of what its weights are worth is
kept, within the budget: a multiple-choice knapsack, solved by dynamic programming.  DominoSearch
(NeurIPS 2021) chooses N of 16 layer by layer with other criteria; that the worth is a share of the
layer's own credits, and every layer counts alike, is our choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from spikenm_fx.errors import PatternError, PlanError
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.pattern import NM, BlockView, PatternLike, Remainder
from spikenm_fx.plan import LayerPlan, Plan, Rule, plan
from spikenm_fx.report.measure import report

__all__ = ["PATTERNS", "plan_within"]

PATTERNS: tuple[PatternLike, ...] = ("1:8", "2:8", "1:4", "2:4")
_UNITS = 4096  # into which the budget is cut; costs are rounded up


@dataclass(frozen=True, slots=True)
class _Option:
    """One pattern of one layer."""

    nm: NM
    cost: float
    worth: float


def plan_within(
    model: nn.Module,
    budget: str,
    *,
    scores: Mapping[str, Tensor] | None = None,
    patterns: Sequence[PatternLike] = PATTERNS,
    example_inputs: Any = None,
    batch_dim: int | None = None,
    rules: Iterable[Rule] = (),
    remainder: Remainder = "skip",
) -> Plan:
    """The plan that keeps most of what the weights are worth within ``budget``.

    Args:
        model: dense.
        budget: ``"0.25 bytes"``: a quarter of the bytes of all weight layers, packed, those that
            stay dense included; ``"0.25 synops"``: of their synaptic operations on the examples.
        scores: what each weight is worth, of the shapes of the weights, by the names of the plan:
            :func:`spikenm_fx.masks.credits.learnt_credits` of a model that was trained for a while.
            Layers that it does not name go by magnitude.
        patterns: to mix.
        example_inputs: see :func:`spikenm_fx.plan`; needed for SynOps.
        batch_dim: of the examples, see :func:`spikenm_fx.report`.
        rules: see :func:`spikenm_fx.plan`; a pattern that a rule states is overruled.
        remainder: see :func:`spikenm_fx.plan`.

    Raises:
        PlanError: for a budget that is none, or one that even the sparsest patterns exceed.
        PatternError: for malformed patterns, or none.
    """
    share, unit = _parsed(budget)
    mixed = [NM.parse(pattern) for pattern in patterns]
    if not mixed:
        raise PatternError("patterns=(): give at least one to choose from, e.g. '2:4'")
    coarsest = max(mixed, key=lambda nm: nm.of)
    decided = plan(
        *(model, coarsest),
        **{"example_inputs": example_inputs, "rules": rules, "remainder": remainder},
    )
    total, rest, of_layer = _costs(model, decided, unit, example_inputs, batch_dim)
    options = [
        _options(model, entry, mixed, of_layer[entry.name], scores, unit == "bytes", remainder)
        for entry in decided.sparse
    ]
    least = rest + sum(min(option.cost for option in each) for each in options)
    if least > share * total:
        raise PlanError(
            f"budget={budget!r}: even the sparsest patterns leave {least / total:.3f} of the dense "
            f"network's {unit} ({rest / total:.3f} in layers that stay dense); ask for that, offer "
            "sparser patterns, or let rules make more layers sparse"
        )
    chosen = _best(options, share * total - rest)
    found = dict(zip((entry.name for entry in decided.sparse), chosen, strict=True))
    layers = tuple(
        replace(entry, nm=found[entry.name], reason=f"{entry.reason}; by a budget of {budget}")
        if entry.name in found
        else entry
        for entry in decided.layers
    )
    return replace(decided, layers=layers)


def _parsed(budget: str) -> tuple[float, str]:
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(bytes|synops)\s*", str(budget))
    share = float(found[1]) if found else 0.0
    if found is None or not 0 < share <= 1:
        raise PlanError(
            f"budget={budget!r}: write a share of the dense network in (0, 1] and what is counted, "
            "'0.25 bytes' or '0.25 synops'"
        )
    return share, found[2]


def _costs(
    model: nn.Module, decided: Plan, unit: str, example_inputs: Any, batch_dim: int | None
) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Of the dense network, of what stays dense, and of each sparse layer: bias, and weights."""
    sparse = {entry.name for entry in decided.sparse}
    if unit == "bytes":
        modules = dict(nn.Module.named_modules(model))
        costs = {}
        for entry in decided.layers:
            weight = entry.find(model)
            assert weight is not None
            bias = getattr(modules.get(entry.name), "bias", None)
            fixed = bias.numel() * bias.element_size() if isinstance(bias, Tensor) else 0
            costs[entry.name] = (float(fixed), float(weight.numel() * weight.element_size()))
    else:
        if example_inputs is None:
            raise PlanError("a budget of synops needs example_inputs, on which they are counted")
        measured = report(model, [example_inputs], batch_dim=batch_dim)
        costs = {one.name: (0.0, float(one.operations.effective)) for one in measured.layers}
    total = sum(map(sum, costs.values()))
    rest = sum(sum(cost) for name, cost in costs.items() if name not in sparse)
    return total, rest, costs


def _options(
    model: nn.Module,
    entry: LayerPlan,
    mixed: Sequence[NM],
    cost: tuple[float, float],
    scores: Mapping[str, Tensor] | None,
    packed: bool,
    remainder: Remainder,
) -> list[_Option]:
    """Patterns that the layer can have, with what they cost and which share they keep."""
    weight = entry.find(model)
    assert weight is not None
    worth = (scores or {}).get(entry.name, weight.detach().abs()).double().to(weight.device)
    if worth.shape != weight.shape:
        raise PlanError(
            f"scores of {entry.name} have shape {tuple(worth.shape)}, its weight {entry.shape}: "
            "give those of this model"
        )
    found = []
    for nm in mixed:
        view = BlockView(nm, entry.shape, entry.axis == 0, entry.groups)
        if view.remainder and remainder != "pad":
            continue
        blocks = view.to_blocks(worth)
        kept = float(blocks[top_mask(blocks, nm.keep, view.present(blocks.device))].sum())
        fixed, whole = cost
        part = view.packed_bytes(weight.element_size()) if packed else whole * nm.density
        found.append(_Option(nm, fixed + part, kept / max(float(worth.sum()), 1e-300)))
    return found


def _best(options: Sequence[Sequence[_Option]], room: float) -> list[NM]:
    """One of each, with the largest sum of worths whose costs fit into ``room``."""
    step = room / _UNITS if room > 0 else 1.0
    value = np.zeros(_UNITS + 1)
    taken = []
    for each in options:
        best = np.full(_UNITS + 1, -np.inf)
        which = np.zeros(_UNITS + 1, dtype=np.int64)
        for index, option in enumerate(each):
            units = math.ceil(option.cost / step - 1e-9)
            if units > _UNITS:
                continue
            with_it = np.full(_UNITS + 1, -np.inf)
            with_it[units:] = value[: _UNITS + 1 - units] + option.worth
            better = with_it > best
            best, which = np.where(better, with_it, best), np.where(better, index, which)
        value = best
        taken.append(which)
    if not np.isfinite(value[-1]):  # rounding up left no room: the cheapest of each fits
        return [min(each, key=lambda option: option.cost).nm for each in options]
    chosen, left = [], _UNITS
    for each, which in zip(reversed(options), reversed(taken), strict=True):
        option = each[int(which[left])]
        chosen.append(option.nm)
        left -= math.ceil(option.cost / step - 1e-9)
    return chosen[::-1]
