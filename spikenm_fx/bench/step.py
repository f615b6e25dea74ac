# SPDX-License-Identifier: Apache-2.0
"""What masks and EID add to a training step, over the dense step of the same network."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import spikenm_fx
from spikenm_fx.bench.measure import interleaved, save
from spikenm_fx.bench.nets.cifar import NETWORKS, build
from spikenm_fx.bench.networks import direct_code
from spikenm_fx.masks import native
from spikenm_fx.masks.methods import Method
from spikenm_fx.masks.methods.spikenm import SpikeNM

__all__ = ["main"]

CANDIDATES: dict[str, tuple[str | Method, str]] = {
    "spikenm 2:4": ("spikenm", "2:4"),
    "spikenm 2:4 without EID": (SpikeNM(eid=None), "2:4"),
    "spikenm 2:8": ("spikenm", "2:8"),
    "spikenm 1:8": ("spikenm", "1:8"),
    "srste 2:4": ("srste", "2:4"),
    "maskllm 2:4": ("maskllm", "2:4"),
    "maskllm 2:8": ("maskllm", "2:8"),
}


def main(arguments: Sequence[str]) -> None:
    """Time whole refresh periods of every candidate in turn; write ``results/step.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench step", description=__doc__)
    parser.add_argument("--network", default="vgg-small", choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="simulation time steps T")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images = direct_code(torch.rand(options.batch, 3, 32, 32) * 2, options.steps)
    labels = torch.randint(0, 10, (options.batch,))
    eid = SpikeNM().eid
    period = 1 if eid is None else eid.every  # so that each timing holds exactly one refresh
    step = partial(_steps, options.network, images, labels, period)
    timed = {"dense": step(None, "")}
    timed |= {name: step(method, nm) for name, (method, nm) in CANDIDATES.items()}
    seconds = interleaved(timed, repeats=options.repeats)
    rows = {
        name: {"milliseconds": 1e3 * value / period, "over_dense": value / seconds["dense"]}
        for name, value in seconds.items()
    }
    for name, row in rows.items():
        print(f"{name:<26}{row['milliseconds']:8.1f} ms  {row['over_dense']:.3f}x")
    sampler = "torch" if native.kernel_for(torch.zeros(1, 4, 1), 2) is None else "native"
    settings = {**vars(options), "sampler": sampler, "steps_timed_together": period}
    print(save("step", {"settings": settings, "rows": rows}))


def _steps(
    network: str, images: Tensor, labels: Tensor, count: int, method: str | Method | None, nm: str
) -> Callable[[], None]:
    model = build(network, images[0], 0)
    if method is not None:
        spikenm_fx.sparsify(model, nm, method=method, total_steps=10**6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def run() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return run
