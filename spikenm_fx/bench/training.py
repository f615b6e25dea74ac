# SPDX-License-Identifier: Apache-2.0
"""One training run that can be killed at any time and goes on from its last epoch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.bench.nets.cifar import build
from spikenm_fx.budget import plan_within
from spikenm_fx.demo.data import Split
from spikenm_fx.demo.networks import LIF, direct_code
from spikenm_fx.masks import EID
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.masks.credits import learnt_credits
from spikenm_fx.masks.diagnostics import diagnose
from spikenm_fx.masks.methods import Method, method_named
from spikenm_fx.masks.methods.activity import Activity
from spikenm_fx.masks.methods.cyclical import Cyclical
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.masks.methods.srste import SRSTE
from spikenm_fx.masks.methods.uticket import UTicket
from spikenm_fx.trace import NeuronSpec, register_neuron

__all__ = ["VARIANTS", "Run", "accuracy", "method_of", "train"]

_PRUNE_AT = 0.5  # of the budget: ASP prunes a trained dense network once, then repeats the recipe
_LATE = ("magnitude", "uticket")  # prune a network that was trained dense for that share


@dataclass(frozen=True, slots=True)
class Run:
    """What distinguishes one run; all but method, pattern and seed are the same for all methods.

    Attributes:
        method: a name of ``sparsify(method=...)`` or of :data:`VARIANTS`.
        pattern: ``"2:4"`` and so on, ``"dense"`` for the dense network, or a budget of bytes as
            :func:`spikenm_fx.budget.plan_within` takes it.
        seed: of weights, batches and masks.
        network: of :data:`spikenm_fx.bench.nets.cifar.NETWORKS`.
        epochs: passes over the training images.
        batch: images a step.
        steps: simulation time steps T.
        lr: peak learning rate, cosine to zero.
        optimizer: ``"adam"`` or ``"sgd"`` (momentum 0.9).
        augment: random shifts and flips.
        data: what the images are, for the record.
        device: where to train.
    """

    method: str
    pattern: str
    seed: int
    network: str = "vgg-small"
    epochs: int = 12
    batch: int = 64
    steps: int = 4
    lr: float = 2e-3
    optimizer: str = "adam"
    augment: bool = False
    data: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def budget(self) -> str | None:
        """Where the pattern is a budget, as in ``"0.25 bytes"``, the budget."""
        return self.pattern if " " in self.pattern else None

    @property
    def name(self) -> str:
        """A file name."""
        pattern = self.pattern.replace(":", "of").replace(" ", "-")
        return f"{self.network}-{self.method}-{pattern}-seed{self.seed}"


VARIANTS: Mapping[str, Method] = MappingProxyType(
    {
        "spikenm-no-eid": SpikeNM(eid=None),
        "spikenm-eligibility": SpikeNM(eid=EID("eligibility")),
        "spikenm-weight": SpikeNM(eid=EID("weight")),
        "spikenm-rate": SpikeNM(eid=EID("weight*rate")),
        "spikenm-marginals": SpikeNM(gradient="marginals"),
        "spikenm-drawn": SpikeNM(decay=None),
        "spikenm-strict": SpikeNM(fade=0.0),
        "srste-fade": SRSTE(fade=SpikeNM().fade),
        "activity-weighted": Activity(weighted=True),
        "activity-still": Activity(growth=0.0),
        "cyclical-rate": Cyclical(),
    }
)
"""One thing changed each: no EID, other credits, marginals instead of draws, only drawn weights
learn, no fade; a fade; ranks by weight times activity; activity without growth, for networks
without norms; a learning rate of each cycle's own."""


def method_of(name: str) -> Method:
    """What ``sparsify`` is given for a method of the bench."""
    return VARIANTS.get(name) or method_named(name)


class KnownLIF(LIF):
    """The same neuron, whose update rule is told, so that its membrane can be computed."""


def _rule(neuron: nn.Module) -> NeuronSpec:
    assert isinstance(neuron, LIF)
    return NeuronSpec(
        framework="unknown",
        class_name=type(neuron).__name__,
        kind="lif",
        exact=True,
        decay=1 - 1 / neuron.tau,
        gain=1 / neuron.tau,
        threshold=neuron.threshold,
        state=(),
        time_axis=0,
        step_mode="multi",
        reset_call=None,
    )


register_neuron(KnownLIF, _rule)


def train(
    run: Run, data: Split, folder: Path, on_epoch: Callable[[int, float], None]
) -> dict[str, Any]:
    """Train, fold, verify and test; or go on, or return what was finished before.

    Args:
        run: the settings.
        data: images and labels.
        folder: keeps ``NAME.json`` of a finished run, ``NAME.pt`` of an unfinished one.
        on_epoch: called with the number of finished epochs and the mean training loss.

    Raises:
        ValueError: if ``folder`` holds a run of this name with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / f"{run.name}.json"
    if finished.exists():
        found: dict[str, Any] = json.loads(finished.read_text())
        if found["run"] != asdict(run):
            raise ValueError(
                f"{finished} is of a run with other settings: {found['run']} there, "
                f"{asdict(run)} here; choose another --out"
            )
        return found
    state = _State(run, data)
    checkpoint = folder / f"{run.name}.pt"
    if checkpoint.exists():
        state.load(torch.load(checkpoint, weights_only=True))
    while state.epoch < run.epochs:
        loss = state.run_epoch()
        _replace(checkpoint, lambda path: torch.save(state.save(), path))
        on_epoch(state.epoch, loss)
    result = state.result()
    _replace(finished, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    checkpoint.unlink(missing_ok=True)
    return result


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all: the process may be killed at any time."""
    partial = path.with_suffix(path.suffix + ".part")
    write(partial)
    os.replace(partial, path)


def coded(images: Tensor, steps: int) -> Tensor:
    """``[T, B, ...]``: images shown at every step, event frames ``[B, T, ...]`` as they are."""
    return direct_code(images, steps) if images.dim() == 4 else images.transpose(0, 1)


class _State:
    """Everything that a checkpoint must hold."""

    def __init__(self, run: Run, data: Split) -> None:
        self.run = run
        self.data = Split(*(part.to(run.device) for part in data))
        self.per_epoch = -(-len(data.train_images) // run.batch)
        self.total = run.epochs * self.per_epoch
        self.network = build(run.network, data.train_images, run.seed).to(run.device)
        self.pruned = run.pattern == "dense"
        self.method = method_of(run.method)
        if run.method not in _LATE:
            self._prune()
        self._start_optimizer(self.total)
        self.batches = torch.Generator().manual_seed(run.seed)
        self.epoch, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []

    def _start_optimizer(self, steps: int) -> None:
        run = self.run
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, run.lr)
            if run.optimizer == "adam"
            else torch.optim.SGD(parameters, run.lr, momentum=0.9)
        )
        self.decay: torch.optim.lr_scheduler.LRScheduler
        if run.method == "cyclical-rate":
            rate = partial(Cyclical().learning_rate, total_steps=steps)
            self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        else:
            self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def _prune(self) -> None:
        if self.pruned:
            return
        run, examples = self.run, None
        if isinstance(self.method, Activity):
            for module in self.network.modules():
                if type(module) is LIF:
                    module.__class__ = KnownLIF
            examples = coded(self.data.train_images[: run.batch], run.steps)
        wanted = self._pattern()
        spikenm_fx.sparsify(
            self.network,
            wanted,
            method=self.method,
            total_steps=self.total,
            seed=run.seed,
            example_inputs=examples,
        )
        self.pruned = True
        if isinstance(self.method, UTicket):
            self._rewind()

    def _pattern(self) -> str | spikenm_fx.Plan:
        """The pattern; for a budget the plan by the credits of one epoch at 2:4, same seed."""
        run = self.run
        if run.budget is None:
            return run.pattern
        probe = build(run.network, self.data.train_images, run.seed).to(run.device)
        spikenm_fx.sparsify(probe, "2:4", total_steps=self.per_epoch, seed=run.seed)
        optimizer = torch.optim.Adam(probe.parameters(), run.lr)
        order = torch.randperm(
            len(self.data.train_images), generator=torch.Generator().manual_seed(run.seed)
        )
        for index in order.split(run.batch):
            scores = probe(coded(self.data.train_images[index], run.steps))
            optimizer.zero_grad()
            F.cross_entropy(scores, self.data.train_labels[index]).backward()
            optimizer.step()
        return plan_within(self.network, run.budget, scores=learnt_credits(probe))

    def _rewind(self) -> None:
        """A ticket starts from the initial weights, with an optimizer of its own."""
        first = build(self.run.network, self.data.train_images, self.run.seed)
        with torch.no_grad():
            masked = dict(self.network.named_parameters())
            for name, parameter in first.named_parameters():
                masked[name].copy_(parameter)
            buffers = dict(self.network.named_buffers())
            for name, buffer in first.named_buffers():
                buffers[name].copy_(buffer)
        self._start_optimizer(self.total - self.epoch * self.per_epoch)

    def run_epoch(self) -> float:
        """One pass; returns the mean loss."""
        if self.epoch >= self.run.epochs * _PRUNE_AT:
            self._prune()
        start = time.perf_counter()
        self.network.train()
        losses = []
        order = torch.randperm(len(self.data.train_images), generator=self.batches)
        for index in order.split(self.run.batch):
            images = self.data.train_images[index]
            if self.run.augment:
                images = _augmented(images, self.batches)
            scores = self.network(coded(images, self.run.steps))
            loss = F.cross_entropy(scores, self.data.train_labels[index])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.decay.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        self.epoch += 1
        self.seconds += time.perf_counter() - start
        masks = [layer.to_dict() for layer in diagnose(self.network)]
        self.history.append({"loss": mean, "masks": masks})
        return mean

    def save(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.run),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "decay": self.decay.state_dict(),
            "batches": self.batches.get_state(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        if saved["settings"] != asdict(self.run):
            raise ValueError(f"the checkpoint is of other settings: {saved['settings']}")
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]
        self.history = saved["history"]
        if self.epoch > self.run.epochs * _PRUNE_AT:  # the first half is dense for magnitude
            self._prune()
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.decay.load_state_dict(saved["decay"])
        self.batches.set_state(saved["batches"])

    def result(self) -> dict[str, Any]:
        self.network.eval()
        if self.run.pattern != "dense":
            self._prune()
            patterns = {name: str(mask.view.nm) for name, _, mask in masked_weights(self.network)}
            spikenm_fx.fold(self.network)
            asked = patterns if self.run.budget else self.run.pattern
            spikenm_fx.verify(self.network, asked).raise_if_invalid()
        images = self.data.test_images[:200]
        measured = spikenm_fx.report(self.network, [coded(images, self.run.steps)], batch_dim=1)
        return {
            "run": asdict(self.run),
            "accuracy": accuracy(self.network, self.data, self.run.steps),
            "density": _density(self.network),
            "packed_bytes": measured.packed_bytes,
            "synops": measured.operations.effective / measured.samples,
            "seconds": self.seconds,
            "history": self.history,
        }


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels, all of a batch alike, and flip half of the images."""
    dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    padded = F.pad(images, (4, 4, 4, 4))
    shifted = padded[..., 4 + dy : 4 + dy + height, 4 + dx : 4 + dx + width]
    flips = torch.rand(len(images), generator=generator) < 0.5
    chosen = flips.to(images.device).view(-1, 1, 1, 1)
    return torch.where(chosen, shifted.flip(-1), shifted)


@torch.no_grad()
def accuracy(network: nn.Module, data: Split, steps: int, batch: int = 256) -> float:
    """Share of the test images that ``network``, in evaluation mode, classifies correctly."""
    right = 0
    pairs = zip(data.test_images.split(batch), data.test_labels.split(batch), strict=True)
    for images, labels in pairs:
        right += int((network(coded(images, steps)).argmax(1) == labels).sum())
    return right / len(data.test_labels)


def _density(network: nn.Module) -> float:
    weights = [p for p in network.parameters() if p.dim() > 1]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)
