# SPDX-License-Identifier: Apache-2.0
"""Mask sampling, forward and backward, against the loop over draws that the equations suggest."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spikenm_fx.bench.measure import RESULTS, interleaved, positive, save
from spikenm_fx.masks.noise import noise_key
from spikenm_fx.masks.sampler import draw_mask, straight_through
from spikenm_fx.pattern import NM

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Time both, print the ratio, write ``results/sampler.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench sampler", description=__doc__)
    parser.add_argument("--weights", type=int, default=12_600_000)
    parser.add_argument(
        "--patterns", nargs="+", default=["2:4", "1:4", "2:8", "1:8", "1:16", "4:8"]
    )
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{options.weights:,} weights, {options.threads} threads, median of {options.repeats}")
    for pattern in map(NM.parse, options.patterns):
        logits = torch.randn(options.weights // pattern.of, pattern.of, 1).mul_(0.01)
        grad = torch.randn_like(logits)
        seconds = interleaved(
            {
                "ours": partial(_ours, logits, grad, pattern.keep),
                "naive": partial(_naive, logits, grad, pattern.keep),
            },
            repeats=options.repeats,
        )
        ratio = seconds["naive"] / seconds["ours"]
        rows.append({"pattern": str(pattern), **seconds, "ratio": ratio})
        print(
            f"{pattern!s:>5}  ours {seconds['ours']:.3f} s  naive {seconds['naive']:.3f} s  "
            f"{ratio:.1f}x"
        )
    print(save("sampler", {"weights": options.weights, "rows": rows}, options.out))


def _ours(logits: Tensor, grad: Tensor, keep: int) -> Tensor:
    key = noise_key(0, 1, "layer")
    draw_mask(logits, keep, kappa=100.0, key=key)
    return straight_through(grad, logits, keep, kappa=100.0, tau=1.0, key=key)


def _naive(logits: Tensor, grad: Tensor, keep: int) -> Tensor:
    """The equations as they stand: per draw an argmax, a softmax and a scatter, under autograd."""
    pi = logits.squeeze(-1).clone().requires_grad_()
    taken = torch.zeros_like(pi)
    left = torch.ones_like(pi)
    for _ in range(keep):
        uniform = torch.rand_like(pi).clamp_min_(1e-12)
        gumbel = -torch.log(-torch.log(uniform))
        z = (100.0 * pi + gumbel).masked_fill(taken.bool(), float("-inf"))
        soft = torch.softmax(z, -1)
        hard = torch.zeros_like(pi).scatter_(-1, z.argmax(-1, keepdim=True), 1.0)
        draw = hard + soft - soft.detach()
        left = left * (1 - draw)
        taken = taken + hard
    mask = 1 - left
    mask.backward(grad.squeeze(-1))
    assert pi.grad is not None
    return pi.grad
