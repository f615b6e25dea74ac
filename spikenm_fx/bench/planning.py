# SPDX-License-Identifier: Apache-2.0
"""How long ``plan`` and ``sparsify`` take on a large spiking transformer."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.bench.measure import RESULTS, positive, save
from spikenm_fx.demo.networks import LIF

__all__ = ["main"]


class _Block(nn.Module):
    """One spiking transformer block: q, k, v, projection and a two-layer MLP, each with a LIF."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {
            "q": (1, 1),
            "k": (1, 1),
            "v": (1, 1),
            "proj": (1, 1),
            "fc1": (1, 4),
            "fc2": (4, 1),
        }
        for name, (i, o) in sizes.items():
            self.add_module(name, nn.Conv1d(i * width, o * width, 1, bias=False))
            self.add_module(f"{name}_bn", nn.BatchNorm1d(o * width))
            self.add_module(f"{name}_lif", LIF())

    def forward(self, x: Tensor) -> Tensor:  # pragma: no cover - planning reads, it does not run
        """Not run here: planning reads the module tree."""
        return x


def _transformer(width: int, depth: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 16, 16), *[_Block(width) for _ in range(depth)], nn.Linear(width, 1000)
    )


def main(arguments: list[str]) -> None:
    """Time both, print, write ``planning.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench planning", description=__doc__)
    parser.add_argument("--width", type=positive, default=640)
    parser.add_argument("--depth", type=positive, default=12)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    times = []
    for _ in range(options.repeats):
        model = _transformer(options.width, options.depth)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        start = time.perf_counter()
        decided = spikenm_fx.plan(model)
        planned = time.perf_counter()
        spikenm_fx.sparsify(model, decided)
        times.append((planned - start, time.perf_counter() - planned))
    plan_seconds, sparsify_seconds = (
        sorted(column)[len(column) // 2] for column in zip(*times, strict=True)
    )
    print(
        f"{parameters / 1e6:.1f} M parameters: plan {plan_seconds:.3f} s, "
        f"sparsify {sparsify_seconds:.3f} s (median of {options.repeats})"
    )
    result = {"parameters": parameters, "plan": plan_seconds, "sparsify": sparsify_seconds}
    print(save("planning", result, options.out))
