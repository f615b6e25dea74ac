# SPDX-License-Identifier: Apache-2.0
"""Exact marginals of N draws without replacement, against enumeration and finite differences."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from strategies import ALL_LAYERS, batches, network
from torch import Tensor

import spikenm_fx
from spikenm_fx.errors import PatternError, PlanError
from spikenm_fx.masks.marginals import inclusion, marginal_gradient
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.masks.sampler import draw_mask

PATTERNS = [(1, 4), (2, 4), (3, 4), (4, 4), (1, 1), (2, 6), (3, 5), (4, 6)]


def enumerated(p: Tensor, keep: int) -> Tensor:
    """The marginals of one block by every order in which ``keep`` can be drawn."""
    total = torch.zeros_like(p)
    for order in permutations(range(len(p)), keep):
        probability, left = torch.ones((), dtype=p.dtype), torch.ones((), dtype=p.dtype)
        for item in order:
            probability = probability * p[item] / left
            left = left - p[item]
        total[list(order)] += probability
    return total


def logits(of: int, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(3, of, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
@tries(4)
@given(seed=st.integers(0, 99))
def test_marginals_are_those_of_every_order_of_draws(keep: int, of: int, seed: int) -> None:
    """Closed forms and dynamic programming agree with enumeration to 1e-10."""
    pi = logits(of, seed)
    found = inclusion(pi, keep, kappa=1.5)
    p = torch.softmax(1.5 * pi, 1)
    for lead in range(3):
        for inner in range(2):
            expected = enumerated(p[lead, :, inner], keep)
            torch.testing.assert_close(found[lead, :, inner], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("keep", "of"), [(1, 4), (2, 4), (3, 4), (2, 2), (2, 8), (3, 8)])
def test_the_gradient_equals_finite_differences(keep: int, of: int) -> None:
    """Of sum(h * P): central differences of the marginals themselves."""
    pi, h, step = logits(of, 1)[:1], logits(of, 2)[:1], 1e-5
    found = marginal_gradient(h, pi, keep, kappa=2.0)
    for position in range(of):
        for inner in range(2):
            sides = []
            for sign in (1, -1):
                moved = pi.clone()
                moved[0, position, inner] += sign * step
                sides.append(float((h * inclusion(moved, keep, kappa=2.0)).sum()))
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(found[0, position, inner]) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize(("keep", "of"), [(1, 4), (2, 4), (2, 8), (3, 5)])
def test_far_apart_logits_stay_exact_in_single_precision(keep: int, of: int) -> None:
    """Where one position takes nearly all, single precision agrees with double."""
    pi, h = logits(of, 3, spread=12.0), logits(of, 4)
    for function in (lambda x: inclusion(x, keep), lambda x: marginal_gradient(h.to(x), x, keep)):
        torch.testing.assert_close(function(pi.float()).double(), function(pi), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (3, 8)])
def test_marginals_are_the_mean_of_the_draws(keep: int, of: int) -> None:
    """Masks that are drawn keep each position as often as the marginals say."""
    pi = logits(of, 5)[:1, :, :1].float()
    drawn = draw_mask(pi.expand(60_000, of, 1).contiguous(), keep, kappa=1.0, key=(3, 4))
    expected = inclusion(pi, keep)[0, :, 0]
    torch.testing.assert_close(drawn.float().mean((0, 2)), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_padded_positions_are_never_drawn(keep: int) -> None:
    """Marginals and gradient are those of the positions that are there."""
    pi, h = logits(6, 6), logits(6, 7)
    present = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool).view(1, 6, 1).expand(3, 6, 1)
    for whole, part in (
        (inclusion(pi, keep, present=present), inclusion(pi[:, :4], keep)),
        (
            marginal_gradient(h * present, pi, keep, present=present),
            marginal_gradient(h[:, :4], pi[:, :4], keep),
        ),
    ):
        torch.testing.assert_close(whole[:, :4], part)
        assert not whole[:, 4:].any()


def test_training_with_marginals() -> None:
    """The option trains, learns other logits than draws do, and is checked before training."""
    states = []
    for gradient in ("draws", "marginals"):
        method = SpikeNM(gradient=gradient)
        model = spikenm_fx.sparsify(
            network(), "2:4", method=method, rules=ALL_LAYERS, total_steps=8
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in batches(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        states.append(model.state_dict()["2.weight_logits"])
    assert not torch.equal(*states)
    with pytest.raises(PlanError, match="'draws' and 'marginals'"):
        SpikeNM(gradient="marginal")
    with pytest.raises(PatternError, match="up to blocks of 16"):
        spikenm_fx.sparsify(
            network(32, 32), "3:32", method=SpikeNM(gradient="marginals"), rules=ALL_LAYERS
        )
