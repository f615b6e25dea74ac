# SPDX-License-Identifier: Apache-2.0
"""Cyclical pruning and regeneration of synapses, by brute force on tiny cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, most_nonzero, network
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import PlanError
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.cyclical import Cyclical
from spikenm_fx.masks.methods.regrow import Regrow
from spikenm_fx.masks.methods.regrowth import exchanged, strongest_blocks
from spikenm_fx.pattern import NM, BlockView


def lone(weight: list[float], nm: str, **options) -> nn.Sequential:
    """One Linear layer with one output and these weights, sparsified."""
    layer = nn.Linear(len(weight), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
    return spikenm_fx.sparsify(nn.Sequential(layer), nm, rules=ALL_LAYERS, **options)


def kept(model: nn.Module) -> list[int]:
    """Positions that training uses now."""
    return (model[0].weight.detach() != 0)[0].nonzero().flatten().tolist()


# -- cyclical -------------------------------------------------------------------------------------


@given(
    total=st.integers(12, 90),
    cycles=st.integers(1, 4),
    pattern=st.sampled_from([(2, 4), (1, 8), (3, 8), (4, 4)]),
)
def test_n_falls_from_m_in_each_cycle(total: int, cycles: int, pattern: tuple[int, int]) -> None:
    """Each cycle starts with all, never rises within itself and ends with N; so does the run."""
    nm, method = NM(*pattern), Cyclical(cycles=cycles)
    period = total // cycles
    found = [method.keep_of(nm, step, total) for step in range(total)]
    for cycle in range(cycles):
        part = found[cycle * period : (cycle + 1) * period]
        assert part[0] == nm.of
        assert part[-1] == nm.keep
        assert part == sorted(part, reverse=True)
    assert set(found[cycles * period :]) <= {nm.keep}


def test_the_ramp_is_cubic() -> None:
    """N + (M - N)(1 - t)^3, rounded, for the share of the cycle that is the ramp."""
    method = Cyclical(cycles=1, ramp=0.5)
    for step in range(100):
        done = min(step / (0.5 * 99), 1.0)
        expected = round(1 + 7 * (1 - done) ** 3)
        assert method.keep_of(NM(1, 8), step, 100) == expected


def test_a_weight_pruned_in_one_cycle_returns_in_the_next() -> None:
    """Masked weights go on learning: one that grows is pruned in cycle 1 and kept in cycle 2."""
    method = Cyclical(cycles=2)
    model = lone([1.0, 0.5, 0.2, 0.1], "1:4", method=method, total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(20):
        seen.append(kept(model))
        assert len(seen[-1]) == method.keep_of(NM(1, 4), len(seen) - 1, 20)
        assert most_nonzero(model.eval()[0].weight, NM(1, 4)) == 1
        model.train()
        optimizer.zero_grad()
        (-model(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))).backward()
        optimizer.step()
    assert seen[0] == seen[10] == [0, 1, 2, 3]
    assert seen[8] == [0]  # position 3 is pruned, and has grown to 0.9
    assert seen[9] == seen[19] == [3]
    assert spikenm_fx.verify(spikenm_fx.fold(model.eval()), {"0": "1:4"}).valid


def test_the_learning_rate_starts_anew_with_each_cycle() -> None:
    """The hint is a cosine from 1 in each cycle, for LambdaLR."""
    method = Cyclical(cycles=2)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: method.learning_rate(s, 20))
    for step in range(20):
        expected = 0.5 * (1 + math.cos(math.pi * (step % 10) / 10)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        schedule.step()
    assert 0 < method.learning_rate(20, 20) <= 1


def test_without_a_length_every_step_is_n_of_m() -> None:
    """Nothing tells how long a cycle is: no cycles; a period alone tells it."""
    assert kept(lone([1.0, 0.5, 0.2, 0.1], "1:4", method="cyclical")) == [0]
    assert len(kept(lone([1.0, 0.5, 0.2, 0.1], "1:4", method=Cyclical(period=5)))) == 4


# -- what exchanges have in common ----------------------------------------------------------------


@given(seed=st.integers(0, 999), of=st.integers(1, 5), padded=st.booleans())
def test_one_exchange_in_a_block(seed: int, of: int, padded: bool) -> None:
    """The least valued kept one for the pruned one of most growth above zero: a loop agrees."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, of, 2)
    mask = torch.rand(shape, generator=generator) < 0.5
    value = torch.randint(0, 4, shape, generator=generator).float()
    growth = torch.randint(-1, 3, shape, generator=generator).float()
    present = torch.rand(3, of, 1, generator=generator) < 0.8 if padded else None
    if present is not None:
        mask &= present
    found = exchanged(mask, value, growth, present)
    for lead in range(3):
        for inner in range(2):
            block = mask[lead, :, inner].tolist()
            there = [True] * of if present is None else present[lead, :, 0].tolist()
            free = [i for i in range(of) if not block[i] and there[i]]
            held = [i for i in range(of) if block[i]]
            best = max(free, key=lambda i: float(growth[lead, i, inner]), default=None)
            if held and best is not None and growth[lead, best, inner] > 0:
                least = min(reversed(held), key=lambda i: float(value[lead, i, inner]))
                block[least], block[best] = False, True
            assert found[lead, :, inner].tolist() == block


def test_the_blocks_with_most_growth() -> None:
    """Half of four blocks: those two whose best growth is largest."""
    growth = torch.tensor([[1.0, 5.0], [4.0, 0.0], [2.0, 2.0], [0.0, 6.0]]).unsqueeze(-1)
    expected = growth.clone()
    expected[[1, 2]] = 0
    assert torch.equal(strongest_blocks(growth, 0.5), expected)


# -- regrow ---------------------------------------------------------------------------------------


def interval(method: Regrow, weight: Tensor, scores: Tensor, epoch: int, nm: NM):
    """What :meth:`Regrow.remember` makes of weights (1, M, 1) at the end of interval ``epoch``."""
    every = method.interval(None)
    view = BlockView(nm, (1, weight.shape[1]))
    draw = Draw(nm, step=epoch * every - 1, view=view)
    assert method.remember(weight, scores, Draw(nm, step=epoch * every, view=view))[1] is scores
    return method.remember(weight, scores, draw)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_regeneration_after_k_intervals_and_not_before(patience: int) -> None:
    """A pruned weight that stays above the bar comes back in the K+1st interval that counts."""
    nm, method = NM(1, 4), Regrow(patience=patience, every=5, percentile=50.0)
    weight = torch.tensor([1.0, 0.2, 0.1, 0.05]).view(1, 4, 1)
    scores = method.init_scores(weight, Draw(nm))
    insisting = torch.tensor([0.3, 0.2, 0.9, 0.05]).view(1, 4, 1)
    masks = []
    for epoch in range(1, 4 * patience + 3):
        _, scores = interval(method, insisting, scores, epoch, nm)
        masks.append(method.final_mask(weight, scores, Draw(nm))[0, :, 0].tolist())
    came = 3 * patience + 1  # evidence counts from interval 2K + 1 on
    assert all(mask == [True, False, False, False] for mask in masks[: came - 1])
    assert all(mask == [False, False, True, False] for mask in masks[came:])


def oracle(method: Regrow, rows: list[list[float]], nm: NM) -> list[tuple[list[float], list[bool]]]:
    """Weights and mask of one block after each interval, weight by weight."""
    first, k = rows[0], method.patience
    widest = max(map(abs, first))
    low, high = [-widest] * len(first), [widest] * len(first)
    over, under, falling, evidence = ([0] * len(first) for _ in range(4))
    before = list(map(abs, first))
    ranked = sorted(range(len(first)), key=lambda i: -abs(first[i]))
    alive = [i in ranked[: nm.keep] for i in range(len(first))]
    found = []
    for epoch, row in enumerate(rows[1:], 1):
        w = list(row)
        for i, value in enumerate(w):
            over[i] = over[i] + 1 if value >= high[i] else 0
            under[i] = under[i] + 1 if value <= low[i] else 0
            falling[i] = falling[i] + 1 if abs(value) < before[i] else 0
            up, down, shrink = over[i] >= k, under[i] >= k, falling[i] >= k
            high[i] = value if up else 0.75 * high[i] if shrink else high[i]
            low[i] = value if down else 0.75 * low[i] if shrink else low[i]
            over[i], under[i] = 0 if up else over[i], 0 if down else under[i]
            falling[i] = 0 if shrink else falling[i]
            before[i] = abs(value)
            if epoch > k:
                w[i] = max(min(value, high[i]), low[i])
        if epoch > 2 * k:
            late = epoch - 2 * k - 1
            share = min(method.percentile + 1.1**late, 99.0) / 100
            bar = sorted(map(abs, w))[max(math.ceil(share * len(w)), 1) - 1]
            for i, value in enumerate(w):
                evidence[i] = evidence[i] + 1 if not alive[i] and abs(value) > bar else 0
            back = [i for i in range(len(w)) if evidence[i] > k]
            if back:
                comes = max(back, key=lambda i: abs(w[i]))
                held = [i for i in range(len(w)) if alive[i]]
                goes = min(reversed(held), key=lambda i: high[i] - low[i])
                alive[comes], alive[goes] = True, False
            evidence = [0 if alive[i] else evidence[i] for i in range(len(w))]
        found.append((w, list(alive)))
    return found


@given(seed=st.integers(0, 999), patience=st.integers(1, 2), keep=st.integers(1, 3))
def test_ranges_masks_and_clamping_equal_a_loop_over_weights(
    seed: int, patience: int, keep: int
) -> None:
    """Twenty intervals of moving weights, one by one."""
    nm = NM(keep, 4)
    method = Regrow(patience=patience, every=3, percentile=40.0)
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(20, 4, generator=generator).cumsum(0)
    scores = method.init_scores(drift[0].view(1, 4, 1), Draw(nm))
    for epoch, (w, alive) in enumerate(oracle(method, drift.tolist(), nm), 1):
        weight, scores = interval(method, drift[epoch].view(1, 4, 1), scores, epoch, nm)
        torch.testing.assert_close(weight[0, :, 0], torch.tensor(w))
        assert method.final_mask(weight, scores, Draw(nm))[0, :, 0].tolist() == alive
        assert sum(alive) == keep


def test_weights_are_clamped_in_a_run() -> None:
    """What the optimizer pushes out of its range is brought back until the range has widened."""
    first = []
    for patience in (1, 4):
        method = Regrow(patience=patience, every=1)
        model = lone([1.0, 0.5, 0.2, 0.1], "1:4", method=method, total_steps=20)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(20):
            optimizer.zero_grad()
            (-model(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))).backward()
            optimizer.step()
        first.append(float(model[0].weight_dense.detach()[0, 0]))
    free = 1.0 + 20 * 0.2
    assert first[0] == pytest.approx(free)  # widened in every interval
    assert first[1] < free - 1


def test_whole_neurons_go_as_published() -> None:
    """Without N:M: the neuron of the smallest ranges loses all synapses, and they may come back."""
    method = Regrow(structure="neuron", patience=1, every=1, rate=0.25, percentile=98.0)
    torch.manual_seed(0)
    model = spikenm_fx.sparsify(
        nn.Sequential(nn.Linear(4, 8, bias=False)), "2:4", method=method, rules=ALL_LAYERS
    )
    before = (model[0].weight.detach() != 0).sum(1)
    assert (before == 4).all()  # M:M
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    counts = []
    for _ in range(6):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        counts.append((model[0].weight.detach() != 0).sum(1).tolist())
    assert counts[1] == [4] * 8
    assert sorted(counts[2]) == [0, 0, *[4] * 6]  # a quarter of eight
    assert sum(map(sum, counts[3:4])) < sum(counts[2])


# -- bad input ------------------------------------------------------------------------------------

BAD = {
    "a cycle longer than the run": (lambda: Cyclical(period=50), 40, "longer than the whole run"),
    "cycles of one step": (lambda: Cyclical(cycles=30), 40, "at least 2 optimizer steps"),
    "no cycle": (lambda: Cyclical(cycles=0), 40, "cycles >= 1"),
    "a period of one step": (lambda: Cyclical(period=1), 40, "needs 2 optimizer steps"),
    "one epoch only": (lambda: Regrow(every=10), 10, "first regeneration comes after 80"),
    "no patience": (lambda: Regrow(patience=0), 40, "must be 1 or more"),
    "an unknown structure": (lambda: Regrow(structure="row"), 40, "'block' and 'neuron'"),
    "a percentile of 100": (lambda: Regrow(percentile=100.0), 40, "percentile < 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_training(case: str) -> None:
    """With a sentence that says what was seen, and the model as it was."""
    made, total, text = BAD[case]
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=text):
        spikenm_fx.sparsify(model, "2:4", method=made(), total_steps=total)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
