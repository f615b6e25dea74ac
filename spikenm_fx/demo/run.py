# SPDX-License-Identifier: Apache-2.0
"""The demo: a spiking network learns handwritten digits dense, at 2:4 and at 1:8."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import spikenm_fx
from spikenm_fx.demo.data import Split, digits
from spikenm_fx.demo.networks import SpikingConvNet, direct_code

__all__ = ["DemoRow", "draw_masks", "run_demo"]

PATTERNS = (None, "2:4", "1:8")
STEPS = 4  # simulation time steps T
BATCH = 64


@dataclass(frozen=True, slots=True)
class DemoRow:
    """What one trained network came to.

    Attributes:
        pattern: ``"dense"`` or the pattern.
        accuracy: share of test images that are classified correctly.
        density: share of non-zero weights over all layers.
        packed_bytes: weights in the packed format, dense layers as they are.
        synops: accumulations of one image: spikes that meet a non-zero weight.
        macs: multiplications of one image: analog input that meets a non-zero weight.
        seconds: training time.
        verification: of the folded weights, None for the dense network.
        network: the folded network, in evaluation mode.
    """

    pattern: str
    accuracy: float
    density: float
    packed_bytes: int
    synops: float
    macs: float
    seconds: float
    verification: spikenm_fx.Verification | None
    network: SpikingConvNet

    def to_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in figures.items() if k not in ("verification", "network")}


def run_demo(
    epochs: int, seed: int = 0, on_step: Callable[[str], None] = lambda pattern: None
) -> Iterator[DemoRow]:
    """Train, fold, verify and measure one network per pattern.

    Args:
        epochs: passes over the 1,258 training images.
        seed: of initial weights, batches and masks.
        on_step: called with the pattern after each optimizer step.
    """
    data = digits()
    for pattern in PATTERNS:
        yield _learn(pattern, data, epochs, seed, on_step)


def steps_of(epochs: int) -> int:
    """Optimizer steps of one network."""
    return epochs * -(-len(digits().train_images) // BATCH)


def _learn(
    pattern: str | None, data: Split, epochs: int, seed: int, on_step: Callable[[str], None]
) -> DemoRow:
    torch.manual_seed(seed)
    network = SpikingConvNet()
    total_steps = epochs * -(-len(data.train_images) // BATCH)
    if pattern is not None:
        spikenm_fx.sparsify(network, pattern, total_steps=total_steps, seed=seed)
    start = time.perf_counter()
    _train(network, data, epochs, total_steps, lambda: on_step(pattern or "dense"))
    seconds = time.perf_counter() - start
    network.eval()
    if pattern is not None:
        spikenm_fx.fold(network)
    images = direct_code(data.test_images, STEPS)
    measured = spikenm_fx.report(network, [images], batch_dim=1)
    return DemoRow(
        pattern=pattern or "dense",
        accuracy=_accuracy(network, images, data.test_labels),
        density=measured.density,
        packed_bytes=measured.packed_bytes,
        synops=measured.operations.synops / measured.samples,
        macs=measured.operations.macs / measured.samples,
        seconds=seconds,
        verification=None if pattern is None else spikenm_fx.verify(network, pattern),
        network=network,
    )


def _train(
    network: SpikingConvNet, data: Split, epochs: int, total_steps: int, on_step: Callable[[], None]
) -> None:
    """An ordinary training loop: nothing in it knows of masks."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    network.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_images)).split(BATCH):
            scores = network(direct_code(data.train_images[batch], STEPS))
            loss = F.cross_entropy(scores, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            on_step()


@torch.no_grad()
def _accuracy(network: SpikingConvNet, images: Tensor, labels: Tensor) -> float:
    return float((network(images).argmax(1) == labels).float().mean())


def draw_masks(rows: list[DemoRow], path: Path) -> None:
    """Write one picture of what was learnt: the non-zero weights of the same layers per pattern.

    Args:
        rows: of :func:`run_demo`.
        path: of the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = {
        "features.2.module.0": "second convolution, 64 outputs x 32 inputs, kernel centre",
        "hidden": "hidden layer, first 64 outputs x first 64 inputs",
    }
    figure = Figure(figsize=(4.2 * len(rows), 3.4 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(layers), len(rows))
    for line, (name, title) in zip(axes, layers.items(), strict=True):
        line[0].set_ylabel(title, fontsize=8)
        for axis, row in zip(line, rows, strict=True):
            weight = row.network.get_parameter(f"{name}.weight").detach()
            matrix = (weight[:, :, 1, 1] if weight.dim() == 4 else weight)[:64, :64]
            limit = float(matrix.abs().max()) or 1.0
            shown = matrix.masked_fill(matrix == 0, float("nan"))
            axis.set_facecolor("#20222b")
            edges = (0, matrix.shape[1], matrix.shape[0], 0)
            axis.imshow(
                shown, cmap="coolwarm", vmin=-limit, vmax=limit, aspect="auto", extent=edges
            )
            axis.set_title(f"{row.pattern}: {float((matrix != 0).float().mean()):.1%} kept")
            axis.set_xticks(range(0, matrix.shape[1] + 1, 8))
            axis.set_yticks([])
            axis.grid(axis="x", color="white", alpha=0.25, linewidth=0.5)
    figure.suptitle("Weights by input channel (columns) and output (rows); dark is pruned")
    figure.savefig(path, dpi=110)
