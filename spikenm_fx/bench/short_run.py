# SPDX-License-Identifier: Apache-2.0
"""Short training on CIFAR-10, for the benches that prune, permute or cut what was trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikenm_fx.bench.data import cifar10, shrunk
from spikenm_fx.demo.data import Split
from spikenm_fx.demo.networks import direct_code

__all__ = ["add_options", "data_of", "fit", "steps_of"]


def add_options(parser: argparse.ArgumentParser, epochs: int = 6) -> None:
    """Where the images are and how long to train: attributes for the functions below."""
    parser.add_argument("--data", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2, help="simulation time steps T")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=5_000)
    parser.add_argument("--size", type=int, default=16, help="pixels of an image's side")
    parser.add_argument("--threads", type=int, default=1)


def data_of(options: argparse.Namespace) -> Split:
    """Images and labels, ``[N, 3, size, size]`` and ``[N]``."""
    return shrunk(cifar10(options.data, options.train_images, options.test_images), options.size)


def steps_of(options: argparse.Namespace, data: Split) -> int:
    """Optimizer steps of the whole run."""
    return int(options.epochs) * -(-len(data.train_images) // int(options.batch))


def fit(
    network: nn.Module,
    data: Split,
    options: argparse.Namespace,
    *,
    steps: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    scores: Callable[[nn.Module, Tensor], Tensor] = lambda network, coded: network(coded),
) -> None:
    """Train in place: Adam, cosine to zero.

    Args:
        network: takes images of T equal steps, ``[T, B, 3, size, size]``.
        data: from :func:`data_of`.
        options: from :func:`add_options`.
        steps: optimizer steps; all epochs by default.
        lr: peak learning rate; that of the options by default.
        seed: of the batches.
        scores: the network's class scores ``[B, 10]`` for one batch.
    """
    steps, lr = steps or steps_of(options, data), lr or options.lr
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    done = 0
    while done < steps:
        order = torch.randperm(len(data.train_images), generator=generator)
        for index in order.split(options.batch)[: steps - done]:
            coded = direct_code(data.train_images[index], options.steps)
            loss = F.cross_entropy(scores(network, coded), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            done += 1
    for parameter in network.parameters():
        parameter.grad = None
