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
from spikenm_fx.bench.measure import interleaved, positive, save
from spikenm_fx.bench.nets.cifar import NETWORKS, build
from spikenm_fx.demo.networks import direct_code
from spikenm_fx.masks import EID, native
from spikenm_fx.masks.methods import Method
from spikenm_fx.masks.methods.spikenm import SpikeNM

__all__ = ["main"]

CANDIDATES: dict[str, tuple[str | Method, str]] = {
    "spikenm 2:4": ("spikenm", "2:4"),
    "spikenm 2:4 refreshing": (SpikeNM(eid=EID(every=1)), "2:4"),
    "spikenm 2:4 without EID": (SpikeNM(eid=None), "2:4"),
    "spikenm 2:8": ("spikenm", "2:8"),
    "spikenm 1:8": ("spikenm", "1:8"),
    "srste 2:4": ("srste", "2:4"),
    "maskllm 2:4": ("maskllm", "2:4"),
    "maskllm 2:8": ("maskllm", "2:8"),
}


def main(arguments: Sequence[str]) -> None:
    """Time single steps of every candidate in turn; write ``results/step.json``.

    Credits are refreshed every K steps: the median is of a step without, a candidate that
    refreshes at each step gives the other kind, and both together what a run pays.
    """
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench step", description=__doc__)
    parser.add_argument("--network", default="vgg-small", choices=sorted(NETWORKS))
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--steps", type=positive, default=4, help="simulation time steps T")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images = direct_code(torch.rand(options.batch, 3, 32, 32) * 2, options.steps)
    labels = torch.randint(0, 10, (options.batch,))
    step = partial(_step, options.network, images, labels)
    timed = {"dense": step(None, "")}
    timed |= {name: step(method, nm) for name, (method, nm) in CANDIDATES.items()}
    seconds = interleaved(timed, repeats=options.repeats)
    rows = {
        name: {"milliseconds": 1e3 * value, "over_dense": value / seconds["dense"]}
        for name, value in seconds.items()
    }
    every = EID().every
    pair = (rows["spikenm 2:4"], rows["spikenm 2:4 refreshing"])
    rows["spikenm 2:4, a run's mean"] = {
        key: ((every - 1) * pair[0][key] + pair[1][key]) / every for key in pair[0]
    }
    for name, row in rows.items():
        print(f"{name:<26}{row['milliseconds']:8.1f} ms  {row['over_dense']:.3f}x")
    sampler = "torch" if native.kernel_for(torch.zeros(1, 4, 1), 2) is None else "native"
    settings = {**vars(options), "sampler": sampler, "refresh_every": every}
    print(save("step", {"settings": settings, "rows": rows}))


def _step(
    network: str, images: Tensor, labels: Tensor, method: str | Method | None, nm: str
) -> Callable[[], None]:
    model = build(network, images[0], 0)
    if method is not None:
        spikenm_fx.sparsify(model, nm, method=method, total_steps=10**6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run
