# SPDX-License-Identifier: Apache-2.0
"""Variance of the logits' gradient over mask draws on one batch: draws, with EID, marginals."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import spikenm_fx
from spikenm_fx.bench.measure import RESULTS, positive, save
from spikenm_fx.bench.nets.cifar import build
from spikenm_fx.demo.data import digits
from spikenm_fx.demo.networks import direct_code
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.masks.diagnostics import logit_noise
from spikenm_fx.masks.eid import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Train on digits, stop at some steps to measure, write ``results/variance.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench variance", description=__doc__)
    parser.add_argument("--pattern", default="1:8")
    parser.add_argument("--at", nargs="+", type=int, default=[1, 40, 80])
    parser.add_argument(
        "--total", type=positive, default=120, help="optimizer steps of the schedule"
    )
    parser.add_argument("--draws", type=positive, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(arguments)
    data = digits()
    network = build("vgg-small", data.train_images, options.seed)
    method = SpikeNM(eid=SpikeNM().eid or EID())
    spikenm_fx.sparsify(
        network, options.pattern, method=method, total_steps=options.total, seed=options.seed
    )
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)

    def backward(index: torch.Tensor) -> None:
        scores = network(direct_code(data.train_images[index], 4))
        F.cross_entropy(scores, data.train_labels[index]).backward()

    rows = []
    fixed = torch.arange(64)
    for step in range(1, max(options.at) + 1):
        optimizer.zero_grad()
        backward(torch.randint(len(data.train_images), (64,)))
        optimizer.step()
        if step in options.at:
            optimizer.zero_grad()
            layers = logit_noise(network, lambda: backward(fixed), draws=options.draws)
            with estimating_by(network, replace(method, gradient="marginals")):
                other = logit_noise(network, lambda: backward(fixed), draws=options.draws)
            for name, found in layers.items():
                found["marginals"] = other[name]["without_eid"]
            ratios = {
                key: statistics.median(v[key] / v["without_eid"] for v in layers.values())
                for key in ("with_eid", "marginals")
            }
            rows.append(
                {
                    **{"step": step, "layers": layers, "median_ratio": ratios["with_eid"]},
                    "median_ratio_marginals": ratios["marginals"],
                }
            )
            shown = "  ".join(f"{key} {ratio:.3f}" for key, ratio in ratios.items())
            print(f"step {step:>4}  noise to signal over that of draws: {shown}")
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"settings": settings, "eid": str(method.eid), "rows": rows}
    print(save("variance", result, options.out))


@contextmanager
def estimating_by(network: torch.nn.Module, method: SpikeNM) -> Iterator[None]:
    """Within it the logits of ``network`` get their gradient by another estimator, same draws."""
    masks = list({id(mask): mask for _, _, mask in masked_weights(network)}.values())
    before = [mask.method for mask in masks]
    for mask in masks:
        mask.method = method
    try:
        yield
    finally:
        for mask, own in zip(masks, before, strict=True):
            mask.method = own
