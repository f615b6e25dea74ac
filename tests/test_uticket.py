# SPDX-License-Identifier: Apache-2.0
"""Tickets that load processing elements evenly, and the rounds that find them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, most_nonzero, network
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import PlanError
from spikenm_fx.lottery import lottery_rounds
from spikenm_fx.masks.methods.balance import even_counts, evened
from spikenm_fx.masks.methods.uticket import UTicket
from spikenm_fx.pattern import NM
from spikenm_fx.report.masks import pe_utilisation


def utilisation(counts: list[int]) -> float:
    return sum(counts) / (len(counts) * max(counts)) if any(counts) else 1.0


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    target=st.sampled_from([None, 0.5, 0.8, 0.95]),
)
def test_counts_reach_the_target_with_the_fewest_moves(
    counts: list[int], target: float | None
) -> None:
    """One connection at a time from the fullest to the emptiest until it is even enough."""
    goal = target if target is not None else 1.0
    moved, moves = list(counts), 0
    while utilisation(moved) < goal and max(moved) - min(moved) > 1:
        moved[moved.index(max(moved))] -= 1
        moved[moved.index(min(moved))] += 1
        moves += 1
    if target is not None and utilisation(moved) < target:
        with pytest.raises(PlanError, match="allow at most"):
            even_counts(counts, target)
    found = even_counts(counts, target, exact=False)
    assert sum(found) == sum(counts)
    assert utilisation(found) >= min(utilisation(moved), goal)
    assert sum(abs(a - b) for a, b in zip(found, counts, strict=True)) // 2 <= moves


@given(seed=st.integers(0, 999), keep=st.integers(1, 4), share=st.floats(0.05, 0.6))
def test_evening_keeps_the_count_and_the_bound(seed: int, keep: int, share: float) -> None:
    """Overloaded rows lose their smallest, others gain their largest that the bound allows."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(8, 4, 4, generator=generator)
    mask = (torch.rand(8, 4, 4, generator=generator) < share) & (
        size >= size.topk(keep, 2).values[..., -1:]
    )
    mask[1] = False
    found = evened(mask, size, keep, 4, None)
    assert int(found.sum()) == int(mask.sum())
    assert int(found.sum(2).max()) <= keep
    for first in (0, 4):
        counts = found[first : first + 4].flatten(1).sum(1).tolist()
        assert max(counts) == -(-sum(counts) // 4)  # as even as whole numbers allow
    for row in range(8):
        lost, won = mask[row] & ~found[row], found[row] & ~mask[row]
        assert not (lost.any() and won.any())
        if lost.any():
            assert size[row][lost].max() <= size[row][found[row]].min()
        if won.any():
            room = keep - found[row].sum(1, keepdim=True) > 0
            left = ~found[row] & room
            if left.any():
                assert size[row][left].max() <= size[row][won].min()


CASES = {
    "linear": lambda: nn.Linear(64, 12, bias=False),
    "convolution": lambda: nn.Conv2d(16, 12, 3, bias=False),
    "grouped": lambda: nn.Conv1d(48, 12, 3, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(96, 12, 2, groups=2, bias=False),
    "padded": lambda: nn.Conv2d(18, 12, 3, bias=False),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("bounded", [True, False])
def test_a_ticket_reaches_the_utilisation(kind: str, bounded: bool) -> None:
    """The count stays that of the density, the bound holds, and no element waits for long."""
    torch.manual_seed(0)
    layer = CASES[kind]()
    with torch.no_grad():  # output channels of very different sizes
        outputs = layer.weight.shape[0 if kind != "transposed" else 1]
        scale = torch.logspace(-0.5, 0.5, outputs)
        shape = (-1, 1) if kind != "transposed" else (1, -1)
        layer.weight.mul_(scale.view(*shape, *[1] * (layer.weight.dim() - 2)))
    seen = {}
    for target in (0, 0.9):
        method = UTicket(utilisation=target, density=0.25, pes=4, bounded=bounded)
        model = nn.Sequential(copy.deepcopy(layer))
        spikenm_fx.sparsify(model, "2:4", method=method, rules=ALL_LAYERS, remainder="pad")
        mask = model[0].weight.detach() != 0
        seen[target] = (int(mask.sum()), pe_utilisation(copy.deepcopy(layer), mask, 4))
        if bounded:
            transposed = isinstance(layer, nn.ConvTranspose2d)
            groups = layer.groups if transposed else 1
            assert (
                most_nonzero(model[0].weight, NM(2, 4), transposed=transposed, groups=groups) <= 2
            )
    assert seen[0][0] == seen[0.9][0] == round(0.25 * layer.weight.numel())
    assert seen[0][1] < 0.9 <= seen[0.9][1]


@pytest.mark.parametrize("nm", ["2:4", "1:8"])
def test_an_exact_layer_is_even_by_construction(nm: str) -> None:
    """Exactly N of M in every block: each output channel has as many, and evening moves nothing."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, bias=False)
    masks = []
    for target in (0, None):
        model = nn.Sequential(copy.deepcopy(layer))
        method = UTicket(utilisation=target, pes=5)
        spikenm_fx.sparsify(model, nm, method=method, rules=ALL_LAYERS)
        masks.append(model[0].weight.detach() != 0)
    assert torch.equal(*masks)
    assert pe_utilisation(layer, masks[0], 5) == 1.0


def _learn(seen: list[dict[str, Tensor]]):
    def train(model: nn.Module, number: int) -> float:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(number)
        loss = torch.zeros(())
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 8, generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return train


def test_rounds_prune_rewind_and_train() -> None:
    """A quarter of what is left goes in each round, and each starts from the initial weights."""
    model, seen = network(), []
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    rounds = lottery_rounds(model, _learn(seen), "2:4", rules=ALL_LAYERS, pes=4)
    assert [each.number for each in rounds] == [0, 1, 2, 3]
    assert [each.density for each in rounds] == pytest.approx([1.0, 0.75, 0.5625, 0.5], abs=0.01)
    for parameters in seen:
        for name, value in start.items():
            assert torch.equal(parameters[name], value)
    assert all(isinstance(each.result, float) for each in rounds)
    assert not torch.equal(model[2].weight_dense, start["2.weight"])
    assert spikenm_fx.verify(spikenm_fx.fold(model.eval()), dict.fromkeys("024", "2:4")).valid


def test_sparser_than_the_bound_what_was_pruned_stays_but_for_evening() -> None:
    """Unstructured, as in the paper: even elements at every round, the share as asked for."""
    model, masks = network(16, 32, 8), []

    def train(model: nn.Module, number: int) -> None:
        if number:
            masks.append({i: model[i].weight.detach() != 0 for i in (0, 2, 4)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    rounds = lottery_rounds(
        model, train, "2:4", density=0.1, share=0.5, bounded=False, pes=4, rules=ALL_LAYERS
    )
    assert [each.density for each in rounds] == pytest.approx([1, 0.5, 0.25, 0.125, 0.1], abs=0.01)
    for before, after in pairwise(masks):
        for i in (0, 2, 4):
            returned = int((after[i] & ~before[i]).sum())
            assert returned <= int(after[i].sum()) // 2
            for part in after[i].sum(1).split(4):
                assert int(part.max()) == -(-int(part.sum()) // len(part))


BAD = {
    "more than all utilisation": (lambda: UTicket(utilisation=1.2), "at most 1"),
    "more density than the pattern": (lambda: UTicket(density=0.7), "more than 2:4 can hold"),
    "no density": (lambda: UTicket(density=0.0), r"in \(0, 1\]"),
    "no elements": (lambda: UTicket(pes=0), "pes >= 1"),
    "what whole numbers cannot": (
        lambda: UTicket(density=0.02, utilisation=0.95, pes=16),
        r"2 \(16, 16\): utilisation=0.95: 5 connections over 16 .* allow at most 0.312",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_targets_that_cannot_be_met(case: str) -> None:
    """Are refused by sparsify, with the layer's name and shape, and the model as it was."""
    made, text = BAD[case]
    model = network()
    before = list(model.state_dict())
    with pytest.raises(PlanError, match=text):
        spikenm_fx.sparsify(model, "2:4", method=made())
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"density": 0.6}, r"density=0.6: the last round of 2:4 keeps a share in \(0, 0.5\]"),
        ({"share": 1.0}, "share=1.0"),
        ({"utilisation": 2.0}, "utilisation=2.0"),
        ({"nm": "5:4"}, "5:4"),
    ],
)
def test_rounds_refuse_before_training(options: dict, text: str) -> None:
    """No round is trained for numbers that no round can meet."""

    def train(model: nn.Module, number: int) -> None:
        raise AssertionError("trained")

    with pytest.raises(spikenm_fx.SpikeNMError, match=text):
        lottery_rounds(network(), train, **options)
