# SPDX-License-Identifier: Apache-2.0
"""Variance of the logits' gradient over mask draws on one batch, with and without EID."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F

import spikenm_fx
from spikenm_fx.bench.measure import positive, save
from spikenm_fx.bench.nets.cifar import build
from spikenm_fx.demo.data import digits
from spikenm_fx.demo.networks import direct_code
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
            ratio = statistics.median(v["with_eid"] / v["without_eid"] for v in layers.values())
            rows.append({"step": step, "median_ratio": ratio, "layers": layers})
            print(f"step {step:>4}  noise to signal with EID over without: {ratio:.3f}")
    print(save("variance", {"settings": vars(options), "eid": str(method.eid), "rows": rows}))
