# SPDX-License-Identifier: Apache-2.0
"""Dead channels of a network trained N:M: how many, what their removal saves, packed or not."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.bench.data import cifar10, shrunk
from spikenm_fx.bench.measure import RESULTS, interleaved, save
from spikenm_fx.bench.nets.cifar import build
from spikenm_fx.bench.oneshot import fit
from spikenm_fx.bench.training import accuracy
from spikenm_fx.channels import remove_dead_channels
from spikenm_fx.demo.data import Split
from spikenm_fx.demo.networks import direct_code
from spikenm_fx.pattern import NM

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Train, fold, remove; print what was saved and write it as JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    data = shrunk(cifar10(options.data, options.train_images, options.test_images), options.size)
    rows = []
    for seed in options.seeds:
        network = build(options.network, data.train_images, seed)
        steps = options.epochs * -(-len(data.train_images) // options.batch)
        spikenm_fx.sparsify(network, options.pattern, total_steps=steps, seed=seed)
        fit(network, data, options, steps, options.lr, seed)
        spikenm_fx.fold(network.eval())
        for parameter in network.parameters():
            parameter.grad = None
        for silent in (False, True):
            rows.append({"seed": seed, **_row(network, data, options, silent)})
            print(
                "seed {seed}, silent ones too {silent}: {removed} channels, {parameters} "
                "parameters, {bytes} bytes, accuracy {accuracy}, ms {ms}".format(**rows[-1]),
                flush=True,
            )
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(save("removal-cifar10", {"settings": settings, "rows": rows}, RESULTS))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench removal", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--network", default="vgg-tiny")
    parser.add_argument("--pattern", default="1:8")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2, help="simulation time steps T")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=5_000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.pattern = str(NM.parse(options.pattern))
    return options


def _row(
    network: nn.Module, data: Split, options: argparse.Namespace, silent: bool
) -> dict[str, Any]:
    smaller = copy.deepcopy(network)
    examples = direct_code(data.test_images[: options.batch], options.steps)
    batches = None
    if silent:
        images = data.train_images[:1000].split(options.batch)
        batches = [direct_code(batch, options.steps) for batch in images]
    saved = remove_dead_channels(smaller, examples, nm=options.pattern, silent_on=batches)
    return {
        "silent": silent,
        "removed": saved.removed,
        "parameters": list(saved.parameters),
        "bytes": list(saved.bytes),
        "accuracy": [accuracy(n, data, options.steps) for n in (network, smaller)],
        "groups": saved.to_dict()["groups"],
        "ms": _latencies({"before": network, "after": smaller}, examples),
    }


def _latencies(networks: dict[str, nn.Module], examples: Tensor) -> dict[str, float]:
    """Milliseconds of a batch, as torch runs it and packed; of CPU time where one thread runs."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    engines = {f"{n}, packed": spikenm_fx.pack(m, examples) for n, m in networks.items()}
    with torch.no_grad():
        runs = {
            name: (lambda module=module: module(examples))
            for name, module in {**networks, **engines}.items()
        }
        return {
            name: 1e3 * seconds
            for name, seconds in interleaved(runs, repeats=31, clock=clock).items()
        }
