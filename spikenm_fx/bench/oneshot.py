# SPDX-License-Identifier: Apache-2.0
"""One-shot N:M by magnitude, with permuted channels and without, before and after a fine-tune."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

import spikenm_fx
from spikenm_fx.bench.data import cifar10, shrunk
from spikenm_fx.bench.measure import RESULTS, save
from spikenm_fx.bench.nets.cifar import build
from spikenm_fx.bench.training import accuracy
from spikenm_fx.channels import apply_permutation, plan_permutation
from spikenm_fx.demo.data import Split
from spikenm_fx.demo.networks import direct_code
from spikenm_fx.pattern import NM
from spikenm_fx.plan import Plan

__all__ = ["fit", "main"]

VARIANTS: tuple[Literal["none", "magnitude", "rate"], ...] = ("none", "magnitude", "rate")
"""Orders of the channels: as trained, or permuted by a score; masks are by magnitude in all."""


def main(arguments: Sequence[str]) -> None:
    """Train a dense network for each seed, prune it every way, and write accuracies as JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    data = shrunk(cifar10(options.data, options.train_images, options.test_images), options.size)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        network = _dense(data, options, seed)
        dense = accuracy(network, data, options.steps)
        print(f"seed {seed}: dense {dense:.2%}", flush=True)
        for pattern in options.patterns:
            for variant in VARIANTS:
                row = _pruned(network, data, options, seed, pattern, variant)
                rows.append({"seed": seed, "dense": dense, **row})
                print("  {nm} {permuted}: {one_shot:.2%}, {tuned:.2%}".format(**row), flush=True)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    table = _summary(rows)
    print(json.dumps(table, indent=1))
    print(save("oneshot-cifar10", {"settings": settings, "summary": table, "rows": rows}, RESULTS))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench oneshot", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--network", default="vgg-tiny")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tune-steps", type=int, default=50, help="of the short fine-tune")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2, help="simulation time steps T")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=5_000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.patterns = [str(NM.parse(pattern)) for pattern in options.patterns]
    return options


def _dense(data: Split, options: argparse.Namespace, seed: int) -> nn.Module:
    network = build(options.network, data.train_images, seed)
    steps = options.epochs * -(-len(data.train_images) // options.batch)
    fit(network, data, options, steps, options.lr, seed)
    return network.eval()


def fit(
    network: nn.Module,
    data: Split,
    options: argparse.Namespace,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """``steps`` batches, Adam, cosine to zero."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    done = 0
    while done < steps:
        order = torch.randperm(len(data.train_images), generator=generator)
        for index in order.split(options.batch)[: steps - done]:
            scores = network(direct_code(data.train_images[index], options.steps))
            loss = F.cross_entropy(scores, data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            done += 1


def _pruned(
    dense: nn.Module,
    data: Split,
    options: argparse.Namespace,
    seed: int,
    pattern: str,
    variant: Literal["none", "magnitude", "rate"],
) -> dict[str, Any]:
    network = copy.deepcopy(dense)
    for parameter in network.parameters():
        parameter.grad = None
    examples = direct_code(data.train_images[: options.batch], options.steps)
    decided = spikenm_fx.plan(network, pattern, example_inputs=examples)
    more = 0.0
    if variant != "none":
        found = plan_permutation(network, examples, decided, score=variant, seed=seed)
        before = accuracy(network.eval(), data, options.steps)
        apply_permutation(network, found)
        more = found.gain
        after = accuracy(network.eval(), data, options.steps)
        if abs(before - after) > 0.005:  # rounding flips a spike now and then
            raise RuntimeError(f"permuted from {before:.2%} to {after:.2%}")
    tuned = _sparse(copy.deepcopy(network), decided)
    fit(tuned, data, options, options.tune_steps, options.lr / 5, seed)
    return {
        "nm": pattern,
        "permuted": variant,
        "kept_more": more,
        "one_shot": _folded_accuracy(_sparse(network, decided), data, options),
        "tuned": _folded_accuracy(tuned, data, options),
    }


def _sparse(network: nn.Module, decided: Plan) -> nn.Module:
    return spikenm_fx.sparsify(network, decided, method="magnitude")


def _folded_accuracy(network: nn.Module, data: Split, options: argparse.Namespace) -> float:
    spikenm_fx.fold(network.eval())
    return accuracy(network, data, options.steps)


def _summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds, and of the difference to no permutation."""
    table = []
    for nm in dict.fromkeys(row["nm"] for row in rows):
        plain = {r["seed"]: r for r in rows if r["nm"] == nm and r["permuted"] == "none"}
        for variant in VARIANTS:
            own = [r for r in rows if r["nm"] == nm and r["permuted"] == variant]
            entry: dict[str, Any] = {"nm": nm, "permuted": variant}
            for key in ("one_shot", "tuned"):
                values = [r[key] for r in own]
                gains = [r[key] - plain[r["seed"]][key] for r in own]
                entry[key] = _mean_sd(values)
                entry[f"{key}_over_none"] = _mean_sd(gains)
            entry["kept_more"] = statistics.mean(r["kept_more"] for r in own)
            table.append(entry)
    return table


def _mean_sd(values: Sequence[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
