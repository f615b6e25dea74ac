# SPDX-License-Identifier: Apache-2.0
"""Two ranks under DistributedDataParallel: one model, and masks that cost no communication."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import started
from loops import any_moved, close, logits, masks, refused, sequences, spiking_net, step_of
from parts import collectives
from strategies import ALL_LAYERS
from torch import nn

import spikenm_fx
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

pytestmark = pytest.mark.slow

STEPS = 5
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "no buffers": {"broadcast_buffers": False},
}

METHODS = {"own initial weights": "spikenm", "own magnitudes": "magnitude"}
"""Methods of ranks that start from weights of their own, until DDP gives them those of rank 0."""
FOREIGN: dict[str, list[dict[str, Any]]] = {
    "pattern": [{"nm": "2:4"}, {"nm": "1:4"}],
    "seed": [{"seed": 0}, {"seed": 1}],
    "total_steps": [{"total_steps": 10}, {"total_steps": 20}],
    "method": [{"method": "spikenm"}, {"method": SpikeNM(rate=0.5)}],
}
"""What two ranks give to sparsify, by what is told to differ."""


def build(*, masked: bool = True, eid: bool = True, nm: str = "2:4") -> nn.Module:
    model = spiking_net()
    if masked:
        method = SpikeNM(eid=EID(every=3) if eid else None, fade=0.0)
        spikenm_fx.sparsify(model, nm, rules=ALL_LAYERS, method=method, total_steps=4 * STEPS)
    return model.train()


def _train(
    model: nn.Module, options: dict[str, Any], rank: int, *, accumulate: int = 1
) -> tuple[list[dict[str, torch.Tensor]], Callable[[], list[Any]]]:
    """The masks of each step but two, and what takes these two, counting what they send."""
    parallel = nn.parallel.DistributedDataParallel(model, **options)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    used = []

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        for part in x[:, rank::2].chunk(accumulate, dim=1):
            (parallel(part).square().mean() / accumulate).backward()
        optimizer.step()

    for x in sequences(STEPS - 2):
        step(x)
        if any(hasattr(m, "weight_nm") for m in model.modules()):
            used.append(masks(model))
    last = sequences(2, seed=9)
    return used, lambda: [collectives(lambda x=x: step(x)) for x in last]


def _rank(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for case, options in CASES.items():
        model = build()
        first = logits(model)
        used, last = _train(model, options, rank)
        sent = last()
        _, dense = _train(build(masked=False), options, rank)
        found[case] = {
            "used": used,
            "state": dict(model.state_dict()),
            "moved": any_moved(first, logits(model)),
            "step": step_of(model),
            "sent": [dict(c) for c in sent],
            "dense": [dict(c) for c in dense()],
        }
    split = build(eid=False)
    used, _ = _train(split, {}, rank, accumulate=3)
    found["split"] = {"used": used, "state": dict(split.state_dict())}
    with_random_noise = build()
    torch.manual_seed(rank)  # ranks whose generators differ, as they always do
    used, _ = _train(with_random_noise, {}, rank)
    found["own generators"] = {"used": used, "state": dict(with_random_noise.state_dict())}
    for case, method in METHODS.items():
        model = spiking_net(seed=rank)
        spikenm_fx.sparsify(model, "2:4", rules=ALL_LAYERS, method=method).train()
        first: list[Any] = []
        hook = model.register_forward_hook(lambda m, *_, seen=first: seen.append(masks(m)))
        used, _ = _train(model, {}, rank)
        hook.remove()
        used = [first[0], *used[1:]]
        found[case] = {"used": used, "state": dict(model.state_dict())}
    for case, arguments in FOREIGN.items():
        model = spiking_net()
        spikenm_fx.sparsify(model, **{"nm": "2:4", **arguments[rank]}).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        found[case] = refused(lambda run=parallel: run(sequences(1)[0]).sum().backward())
        dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found, all cases in one launch."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    started(_rank, free_port(), str(folder), ranks=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", [*CASES, "split", "own generators", *METHODS])
def test_ranks_stay_one_model(ranks: list[dict[str, Any]], case: str) -> None:
    """EID on: masks of every step and the whole state are equal bit by bit on both ranks."""
    one, other = (found[case] for found in ranks)
    assert len(one["used"]) == STEPS - 2
    for a, b in zip(one["used"], other["used"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for key, value in one["state"].items():
        assert torch.equal(value, other["state"][key]), key


@pytest.mark.parametrize("case", CASES)
def test_masks_learn_on_every_rank(ranks: list[dict[str, Any]], case: str) -> None:
    """Logits move and steps are exact, whatever DDP's options are."""
    for found in ranks:
        assert found[case]["moved"]
        assert found[case]["step"] == STEPS


@pytest.mark.parametrize("case", CASES)
def test_masks_cost_no_communication(ranks: list[dict[str, Any]], case: str) -> None:
    """The collectives of a step are those of the dense model, one by one; none is for masks.

    Credits of EID are of each rank's own activations: their refresh may cost one more, of less than
    a byte for each masked weight, which are 1 % of the bytes where every 20th step has one.
    """
    every = EID().every
    for found in ranks:
        (refresh, ordinary), (dense, other) = found[case]["sent"], found[case]["dense"]
        assert sum(dense.values()) == sum(other.values()) > 0
        assert ordinary == other
        more = {name: refresh.get(name, 0) - dense.get(name, 0) for name in refresh | dense}
        assert min(more.values()) >= 0
        assert sum(n for name, n in more.items() if name.startswith("c10d::")) <= 1
        average = ((every - 1) * ordinary["bytes"] + refresh["bytes"]) / every
        assert dense["bytes"] < average <= 1.01 * dense["bytes"]


@pytest.mark.parametrize("case", FOREIGN)
def test_ranks_that_differ_are_refused(ranks: list[dict[str, Any]], case: str) -> None:
    """Masks of another pattern, seed, length or method: one error on every rank that says which."""
    for found in ranks:
        assert found[case] is not None, "trained without a word"
        assert case in found[case]
        assert "sparsify" in found[case]


def test_two_ranks_are_one_process(ranks: list[dict[str, Any]]) -> None:
    """Accumulated and reduced gradients give the masks of the whole batch in one process."""
    model = build(eid=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    expected = ranks[0]["split"]
    for x, used in zip(sequences(STEPS - 2), expected["used"], strict=True):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert all(torch.equal(mask, used[name]) for name, mask in masks(model).items())
    close(dict(model.state_dict()), expected["state"], rtol=1e-3, atol=1e-3)
