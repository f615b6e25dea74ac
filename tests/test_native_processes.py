# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels in threads, in forked and in spawned processes: the same numbers, no hang."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest
import torch
from loops import heard
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.native.library import available_kernels

SECONDS = 60  # after which a process counts as hanging
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available_kernels(), reason="no compiled kernels here"),
]


def masked() -> nn.Module:
    """Large enough that kernels run on the pool of threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 256))
    return spikenm_fx.sparsify(model, "2:4", rules=[Rule("re:.*")])


def packed() -> nn.Module:
    with heard():
        folded = spikenm_fx.fold(masked().eval())
        return spikenm_fx.pack(folded, spikes(0), backend="fma")


def spikes(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return (torch.rand(64, 512, generator=generator) < 0.2).float()


MODELS = {"masked": masked, "packed": packed}


class Answers(Dataset):
    """What each model says to samples, computed in the workers of a loader."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.models = {kind: model.eval() for kind, model in models.items()}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return {kind: model(spikes(index)) for kind, model in self.models.items()}


@pytest.fixture
def two_threads() -> Any:
    """With the pool in use before anything else."""
    torch.set_num_threads(2)
    step(masked(), spikes(0))
    yield
    torch.set_num_threads(1)


def step(model: nn.Module, x: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    return model[0].weight.detach().clone()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_compute_the_same(start: str, two_threads: None) -> None:
    """Forked after the pool was used, or started afresh with pickled models."""
    data = Answers({kind: build() for kind, build in MODELS.items()})
    expected = [data[index] for index in range(len(data))]
    loader = DataLoader(
        data, batch_size=None, num_workers=2, timeout=SECONDS, multiprocessing_context=start
    )
    for found, wanted in zip(loader, expected, strict=True):
        assert found.keys() == wanted.keys()
        for kind, answer in wanted.items():
            torch.testing.assert_close(found[kind], answer, rtol=1e-5, atol=1e-6)


def _in_child(results: Any, layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        results.send(layer(x).numpy())
    results.close()


def test_a_kernel_does_not_hang_in_a_forked_process(two_threads: None) -> None:
    """A bare fork keeps the number of threads, though not the threads; torch's own layers hang."""
    layer, x = packed()[0], spikes(1)
    with torch.no_grad():
        expected = layer(x)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(there, layer, x), daemon=True)
    child.start()
    there.close()
    found = here.recv() if here.poll(SECONDS) else None
    child.kill()
    child.join()
    assert found is not None, "the forked process hangs"
    assert torch.equal(torch.from_numpy(found), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_threads_compute_the_same(kind: str) -> None:
    """One model in many threads at once."""
    model = MODELS[kind]().eval()
    with torch.no_grad():
        expected = [model(spikes(index)) for index in range(4)]
    found: dict[tuple[int, int], Tensor] = {}

    def run(thread: int) -> None:
        for index in range(len(expected)):
            with torch.no_grad():
                found[thread, index] = model(spikes(index))

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(found) == 16
    for (_, index), answer in found.items():
        assert torch.equal(answer, expected[index])
