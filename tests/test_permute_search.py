# SPDX-License-Identifier: Apache-2.0
"""The search for the order of channels in which N:M keeps most, with and without the kernel."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from torch import Tensor

from spikenm_fx.bench.permute import efficacy
from spikenm_fx.channels.search import Effort, Scored, best_order, kept, total
from spikenm_fx.native.library import native_status
from spikenm_fx.pattern import NM

NATIVE = pytest.mark.parametrize("native", [True, False], ids=["kernel", "torch"])
PATTERNS = ["2:4", "1:4", "2:8", "1:8", "3:5", "4:8", "1:2", "7:16"]


def needs(native: bool) -> None:
    if native and not native_status().available:
        pytest.skip("no compiled kernels here")


def kept_slowly(scores: Tensor, nm: NM) -> float:
    """The definition, in plain Python: in each row, of each block, the largest N."""
    rows = scores.T.tolist()
    blocks = (row[at : at + nm.of] for row in rows for at in range(0, len(row), nm.of))
    return sum(sum(sorted(block, reverse=True)[: nm.keep]) for block in blocks)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Scored], int]:
    """One to three weights that read the same channels, ties and zeros among their scores."""
    channels = draw(st.integers(2, 24))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        nm = NM.parse(draw(st.sampled_from(PATTERNS)))
        before, behind = draw(st.integers(0, nm.of - 1)), draw(st.integers(0, 3))
        rows = draw(st.integers(1, 20))
        torch.manual_seed(draw(st.integers(0, 999)))
        scores = torch.rand(before + channels + behind, rows)
        if draw(st.booleans()):
            scores = (scores * 3).round()
        parts.append(Scored(scores, nm, before))
    return parts, channels


def reordered(part: Scored, order: Tensor) -> Tensor:
    inside = part.scores[part.fixed : part.fixed + len(order)][order]
    return torch.cat([part.scores[: part.fixed], inside, part.scores[part.fixed + len(order) :]])


@NATIVE
@tries(60)
@given(problem=problems())
def test_the_order_is_one_and_no_swap_keeps_more(
    native: bool, problem: tuple[list[Scored], int]
) -> None:
    """A permutation, never worse than the start, and at the end no swap of two helps."""
    needs(native)
    parts, channels = problem
    order = best_order(parts, channels, seed=3, native=native)
    assert sorted(order.tolist()) == list(range(channels))
    found = sum(kept_slowly(reordered(part, order), part.nm) for part in parts)
    start = sum(kept_slowly(part.scores, part.nm) for part in parts)
    assert found >= start - 1e-3
    assert found == pytest.approx(sum(kept(part, order) for part in parts), rel=1e-5)
    for i, j in itertools.combinations(range(min(channels, 8)), 2):
        swapped = order.clone()
        swapped[[i, j]] = swapped[[j, i]]
        other = sum(kept_slowly(reordered(part, swapped), part.nm) for part in parts)
        assert other <= found * (1 + 1e-5) + 1e-3


@NATIVE
@pytest.mark.parametrize("nm", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("seed", range(3))
def test_efficacy_on_the_random_matrix_that_apex_reports(nm: str, seed: int, native: bool) -> None:
    """64 rows x 128 columns in [0, 1): at least 38 % of what could be lost less is lost less."""
    needs(native)
    scores = torch.rand(64, 128, generator=torch.Generator().manual_seed(seed)).T.contiguous()
    part = Scored(scores, NM.parse(nm))
    order = best_order([part], 128, seed=seed, native=native)
    assert efficacy(part, order) >= 0.38


def test_efficacy_is_zero_for_no_permutation_and_one_for_unstructured() -> None:
    """The two ends of the scale."""
    torch.manual_seed(0)
    part = Scored(torch.rand(16, 8), NM(2, 4))
    assert efficacy(part, torch.arange(16)) == 0.0
    half = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])[:, None].expand(8, 4)
    perfect = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    assert efficacy(Scored(half.contiguous(), NM(2, 4)), perfect) == 1.0


@NATIVE
def test_the_seed_decides(native: bool) -> None:
    """Equal seeds find equal orders."""
    needs(native)
    torch.manual_seed(0)
    part = Scored(torch.rand(32, 40), NM(2, 4))
    first, again = (best_order([part], 32, seed=5, native=native) for _ in range(2))
    assert torch.equal(first, again)
    if native:
        assert not torch.equal(first, best_order([part], 32, seed=6))


@NATIVE
def test_columns_that_only_share_a_block_do_not_move(native: bool) -> None:
    """What stands before and behind the channels counts, and stays."""
    needs(native)
    scores = torch.zeros(8, 1)
    scores[0] = scores[1] = 5.0  # fixed: they fill what the first block keeps
    scores[2:4] = 4.0  # channels 0 and 1, lost where they are
    part = Scored(scores, NM(2, 4), fixed=2)
    order = best_order([part], 6, native=native)
    assert kept(part) == 10.0
    assert kept(part, order) == total(part) == 18.0


@NATIVE
def test_progress_is_told_and_may_end_the_search(native: bool) -> None:
    """Shares rise from 0 to 1; what the callback raises comes out."""
    needs(native)
    torch.manual_seed(0)
    part = Scored(torch.rand(64, 16), NM(2, 4))
    shares: list[float] = []
    best_order([part], 64, progress=shares.append, native=native)
    assert shares == sorted(shares)
    assert shares
    assert all(0.0 <= share <= 1.0 for share in shares)

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        best_order([part], 64, progress=stop, native=native)


@NATIVE
def test_without_time_or_tries_the_order_is_still_one(native: bool) -> None:
    """A search that is cut short returns where it is."""
    needs(native)
    torch.manual_seed(0)
    part = Scored(torch.rand(128, 64), NM(2, 4))
    for effort in (Effort(10**9, 10**9, 1e-9), Effort(0, 0), Effort(100, 0), Effort(0, 100)):
        order = best_order([part], 128, effort, native=native)
        assert sorted(order.tolist()) == list(range(128))
        assert kept(part, order) >= 0.95 * kept(part)


def test_effort_stays_within_its_limit() -> None:
    """Large models search less: descent first, annealing only with more swaps than pairs."""
    whole = Effort.for_channels(128)
    assert whole.proposals > 0
    for limit in (10, 10_000, 200_000, 10**9):
        effort = Effort.for_channels(128, limit=limit)
        assert effort.proposals + effort.tries <= limit
        assert effort.proposals == 0 or effort.proposals > 128 * 64
