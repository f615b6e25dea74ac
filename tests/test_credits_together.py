# SPDX-License-Identifier: Apache-2.0
"""Credits in the six bits a number in which ranks send them, and how ranks notice differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import heard, masked_modules, sequences, spiking_net, train_step
from strategies import ALL_LAYERS

import spikenm_fx
from spikenm_fx.masks import EID
from spikenm_fx.masks.eid.codes import BYTES, GROUP, decoded, encoded
from spikenm_fx.masks.fingerprint import summed, told_apart
from spikenm_fx.masks.methods.spikenm import SpikeNM

numbers = st.floats(-1.0, 1.0, width=32) | st.just(0.0)
groups = st.lists(st.lists(numbers, min_size=GROUP, max_size=GROUP), min_size=1, max_size=5)


def bound_of(group: torch.Tensor) -> torch.Tensor:
    """What the docstring promises of each number."""
    scale = 2**0.5 * group.abs().amax(1, keepdim=True)
    signed = (group < 0).any(1, keepdim=True)
    return (scale / torch.where(signed, 15.0, 31.0)).clamp_min(2.0**-63)


@given(groups)
def test_numbers_come_back_to_within_their_bound(rows: list[list[float]]) -> None:
    """In six bytes for eight of them; zeros and signs stay as they were."""
    sent = encoded(torch.tensor(rows))
    back = decoded(sent)
    assert sent.shape == (len(rows), BYTES)
    assert sent.dtype is torch.uint8
    assert bool(((back - torch.tensor(rows)).abs() <= bound_of(torch.tensor(rows))).all())
    assert not bool((back * torch.tensor(rows) < 0).any())
    assert bool((back[torch.tensor(rows) == 0] == 0).all())


def test_a_small_number_keeps_a_value_beside_a_large_one() -> None:
    """A five-hundredth of the largest of the group is still there; scales go down to 2**-60."""
    for size in (1.0, 2.0**-20, 2.0**-60):
        row = torch.tensor([[1.0, 0.1, 0.01, 0.002, 0.0, 0.5, 0.25, 0.75]]) * size
        back = decoded(encoded(row))
        assert bool(((back > 0) == (row > 0)).all())
        assert back.argsort(1).equal(row.argsort(1))


@given(st.lists(st.integers(0, 2**20 - 1), min_size=2, max_size=300), st.integers(0, 2**20 - 1))
def test_one_sum_tells_whether_all_ranks_have_the_same(others: list[int], one: int) -> None:
    """Numbers and their squares are summed without rounding."""
    for ranks in ([one] * len(others), others):
        fields = [torch.tensor([number, 0, 1]) for number in ranks]
        same = told_apart(torch.stack([summed(own) for own in fields]).sum(0), len(ranks))
        assert same.tolist() == [len(set(ranks)) == 1, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("nm", ["2:4", "1:8"])
def test_six_bits_move_targets_less_than_other_samples_do(nm: str) -> None:
    """On average over a network's blocks far less than leaving out every other sample does."""
    found = {}
    for share in ("all", "half"):
        model = spiking_net(64)
        method = SpikeNM(eid=EID(every=1), fade=0.0)
        spikenm_fx.sparsify(model, nm, rules=ALL_LAYERS, method=method, total_steps=40).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with heard():
            for x in sequences(6, size=32):
                train_step(model, optimizer, x if share == "all" else x[:, ::2])
        state = model.state_dict()
        found[share] = {name: state[f"{name}.weight_eid"] for name in masked_modules(model)}
        dense = {name: state[f"{name}.weight_dense"].abs() for name in found[share]}
    moved = {"six bits": 0.0, "half": 0.0}
    block = int(nm.partition(":")[2])
    for name, credit in found["all"].items():
        if not bool(credit.any()):
            continue
        unit = credit.flatten().view(-1, GROUP) / credit.abs().max()
        near = (decoded(encoded(unit)) * credit.abs().max()).view_as(credit)
        targets = [
            torch.softmax(blocks / blocks.mean(1, keepdim=True).clamp_min(1e-30), 1)
            for blocks in (
                (dense[name] * c).view(-1, block) for c in (credit, near, found["half"][name])
            )
        ]
        moved["six bits"] += float((targets[1] - targets[0]).abs().mean())
        moved["half"] += float((targets[2] - targets[0]).abs().mean())
    assert 0 < moved["six bits"] < moved["half"] / 5
