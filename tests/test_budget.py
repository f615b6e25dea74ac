# SPDX-License-Identifier: Apache-2.0
"""Plans within a budget: never beyond it, and as good as trying everything."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, network
from torch import Tensor

import spikenm_fx
from spikenm_fx.budget import PATTERNS, plan_within
from spikenm_fx.errors import PatternError, PlanError
from spikenm_fx.pattern import NM, BlockView

MIXED = [NM.parse(pattern) for pattern in PATTERNS]


def kept_share(worth: Tensor, nm: NM) -> float:
    """Block by block, the largest ones."""
    total = 0.0
    for row in worth.tolist():
        for first in range(0, len(row), nm.of):
            total += sum(sorted(row[first : first + nm.of], reverse=True)[: nm.keep])
    return total / float(worth.sum())


@given(seed=st.integers(0, 99), share=st.sampled_from([0.22, 0.3, 0.4, 0.5, 0.62]))
def test_no_mix_of_patterns_keeps_more(seed: int, share: float) -> None:
    """Every combination of three layers is tried; rounding may cost a thousandth of the budget."""
    model = network(16, 32, 8)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(model[int(name)].weight.shape) for name in "024"}
    scores = {
        name: torch.rand(shape, generator=generator) ** (1 + 8 * index)
        for index, (name, shape) in enumerate(shapes.items())
    }
    biases = sum(model[int(name)].bias.numel() * 4 for name in "024")
    dense = biases + sum(4 * model[int(name)].weight.numel() for name in "024")

    def size(name: str, nm: NM) -> int:
        return BlockView(nm, shapes[name]).packed_bytes(4)

    def worth(mix: tuple[NM, ...]) -> float:
        return sum(kept_share(scores[name], nm) for name, nm in zip("024", mix, strict=True))

    def fits(mix: tuple[NM, ...], room: float) -> bool:
        return biases + sum(size(n, nm) for n, nm in zip("024", mix, strict=True)) <= room

    decided = plan_within(model, f"{share} bytes", scores=scores, rules=ALL_LAYERS)
    found = tuple(entry.nm for entry in decided.sparse)
    assert fits(found, share * dense)
    mixes = [mix for mix in product(MIXED, repeat=3) if fits(mix, share * 0.999 * dense)]
    assert worth(found) >= max(map(worth, mixes)) - 1e-9


def test_the_plan_is_applied_and_packed_within_the_budget() -> None:
    """What sparsify makes of it has the bytes that the report counts."""
    model = network(16, 32, 8)
    decided = plan_within(model, "0.4 bytes", rules=ALL_LAYERS)
    assert len({str(entry.nm) for entry in decided.sparse}) > 1
    spikenm_fx.fold(spikenm_fx.sparsify(model, decided).eval())
    assert spikenm_fx.verify(model, decided).valid
    measured = spikenm_fx.report(model, torch.randn(4, 16), plan=decided)
    whole = spikenm_fx.report(network(16, 32, 8), torch.randn(4, 16))
    assert measured.packed_bytes <= 0.4 * whole.dense_bytes


def test_a_budget_of_operations() -> None:
    """Layers that spike more cost more: the mean of densities by operations fits."""
    torch.manual_seed(0)
    model, x = network(16, 32, 8), torch.randn(8, 16)
    decided = plan_within(model, "0.3 synops", example_inputs=x, rules=ALL_LAYERS)
    operations = {one.name: one.operations.effective for one in spikenm_fx.report(model, x).layers}
    spent = sum(operations[e.name] * e.nm.density for e in decided.sparse if e.nm)
    assert spent <= 0.3 * sum(operations.values())


BAD = {
    "below the sparsest": ({"budget": "0.1 bytes"}, "even the sparsest patterns leave"),
    "dense layers alone exceed it": ({"budget": "0.2 bytes", "rules": ()}, "that stay dense"),
    "a word": ({"budget": "small"}, "'0.25 bytes' or '0.25 synops'"),
    "more than all": ({"budget": "1.5 bytes"}, r"in \(0, 1\]"),
    "operations without examples": ({"budget": "0.5 synops"}, "needs example_inputs"),
    "scores of another model": (
        {"budget": "0.5 bytes", "scores": {"2": torch.ones(3, 3)}},
        r"scores of 2 have shape \(3, 3\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_budgets(case: str) -> None:
    """Are refused with what the layers would need."""
    options, text = BAD[case]
    with pytest.raises(PlanError, match=text):
        plan_within(network(16, 32, 8), **{"rules": ALL_LAYERS, **options})
    with pytest.raises(PatternError, match="at least one"):
        plan_within(network(), "0.5 bytes", patterns=())
