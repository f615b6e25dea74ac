# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what becomes of each layer, what it sees, how it will run, what stands in the way.

Nothing is guessed: the plan decides, the trace tells signals and neurons, and the kernels are timed
on this machine on a copy that is pruned in one shot.
"""

from __future__ import annotations

import copy
import platform
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.cli.common import Loaded
from spikenm_fx.cli.packing import KernelChoice, kernel_choices
from spikenm_fx.errors import SpikeNMError
from spikenm_fx.plan.plan import LayerPlan, Plan
from spikenm_fx.recipe.waking import rouse, wake
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["Diagnosis", "LayerDiagnosis", "diagnose"]


@dataclass(frozen=True, slots=True)
class LayerDiagnosis:
    """One weight layer.

    Attributes:
        name: qualified name.
        weight: its shape.
        pattern: what it will obey, or None where it stays dense.
        reason: of the plan.
        signal: what its input carries; ``"unknown"`` where the trace cannot tell.
        feeds: neurons that it drives.
        kernel: how it will run on this machine, or "-" where that is not known.
        gain: dense time over the kernel's, measured here; None where it was not measured.
        rate: share of its input that spiked then; None where it was not measured.
        advice: what to do about it, where something can be done.
    """

    name: str
    weight: tuple[int, ...]
    pattern: str | None
    reason: str
    signal: str
    feeds: tuple[str, ...]
    kernel: str = "-"
    gain: float | None = None
    rate: float | None = None
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What ``doctor`` found.

    Attributes:
        model: class name.
        machine: processor, threads, torch.
        route: how the trace was obtained.
        notes: what was unusual about it.
        neurons: neuron layers by framework and class.
        layers: all weight layers.
        blocked: what keeps the rest from running, with what to do.
        runs: whether the model runs the input that was given; None without one.
    """

    model: str
    machine: str
    route: str
    notes: tuple[str, ...]
    neurons: dict[str, int]
    layers: tuple[LayerDiagnosis, ...]
    blocked: tuple[str, ...] = field(default=())
    runs: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        sparse = [layer for layer in self.layers if layer.pattern]
        head = [
            f"{self.model} on {self.machine}",
            f"layers   {len(sparse)} of {len(self.layers)} weight layers become N:M",
            f"trace    route {self.route}: {_ROUTES.get(self.route, 'not traced')}",
            f"neurons  {_counted(self.neurons) or 'none found'}",
            f"spikes   {_signals(self.layers)}",
            *([f"kernels  {_speed(self.layers)}"] if any(la.gain for la in self.layers) else []),
            "",
        ]
        rows = [_HEAD, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(8)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[8]]).rstrip()
            for row in rows
        ]
        advice: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.advice:
                advice.setdefault(layer.advice, []).append(layer.name)
        tail = [f"- {text} [{_few(names)}]" for text, names in advice.items()]
        tail += [f"- {text}" for text in self.blocked]
        tail += [f"- trace: {note}" for note in self.notes]
        return "\n".join([*head, *lines, *(["", "what to do", *tail] if tail else [])])


_HEAD = ("layer", "weight", "pattern", "input", "drives", "runs as", "gain", "rate", "why")

_ROUTES = {
    "fx": "followed with real values through every operation",
    "fx+execution": "followed, but for some submodules that were recorded while running",
    "execution": "recorded from one real forward",
    "symbolic": "without example input, signals are not known",
    "modules": "the module tree alone; masks work, signals and groups are not known",
}


def diagnose(loaded: Loaded) -> Diagnosis:
    """Examine a model; it is left as it was.

    Raises:
        PlanError: if nothing could become sparse.
    """
    blocked: list[str] = []
    graph = _traced(loaded, blocked)
    decided = spikenm_fx.plan(loaded.model, graph=graph, **loaded.recipe.plan_options())
    runs = graph is not None if loaded.knows_its_input else None
    kernels = _kernels(loaded, decided, blocked) if runs else {}
    rules = loaded.recipe.plan_options()["rules"]
    ruled = {
        entry.name
        for entry in decided.layers
        if any(rule.matches(entry.name, entry.subject(loaded.model)) for rule in rules)
    }
    layers = tuple(_layer(entry, graph, kernels, entry.name in ruled) for entry in decided.layers)
    neurons: dict[str, int] = {}
    for record in graph.neurons.values() if graph is not None else ():
        known = record.spec.framework != "unknown"
        name = f"{record.spec.framework} " * known + record.spec.class_name
        neurons[name] = neurons.get(name, 0) + 1
    return Diagnosis(
        model=decided.model,
        machine=_machine(),
        route=graph.route if graph is not None else "none",
        notes=tuple(str(note) for note in graph.notes) if graph is not None else (),
        neurons=neurons,
        layers=layers,
        blocked=tuple(blocked),
        runs=runs,
    )


def _traced(loaded: Loaded, blocked: list[str]) -> SpikingGraph | None:
    if not loaded.knows_its_input:
        blocked.append("no input shape is known: give --input, e.g. --input 4,3,32,32, for signals")
    try:
        return loaded.graph() or trace(loaded.model)
    except SpikeNMError as error:
        blocked.append(f"the model does not run this input, masks still work: {error}")
        return None


def _kernels(loaded: Loaded, decided: Plan, blocked: list[str]) -> dict[str, KernelChoice]:
    """How layers will run, from a copy that is pruned in one shot.

    Speed depends on firing: without a checkpoint the copy is woken first, or it would be silent.
    """
    try:
        twin = copy.deepcopy(loaded.model)
        if not loaded.trained:
            _wake(twin, loaded)
        spikenm_fx.fold(spikenm_fx.sparsify(twin, decided, method="magnitude"))
        return kernel_choices(twin, loaded.batch())
    except Exception as error:
        blocked.append(f"kernels could not be tried: {type(error).__name__}: {error}")
        return {}


def _wake(twin: nn.Module, loaded: Loaded) -> None:
    from spikenm_fx.recipe.target import forward
    from spikenm_fx.report import report
    from spikenm_fx.state import reset_to_rest

    batch, inputs = loaded.batch(), loaded.recipe.inputs

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        return forward(model, batch, inputs)

    def firing() -> dict[str, float]:
        return {each.name: each.rate for each in report(twin, [batch], forward=run).neurons}

    wake(twin, lambda model: run(model, batch), reset_to_rest)
    rouse(twin, batch, firing)
    reset_to_rest(twin)


def _layer(
    entry: LayerPlan,
    graph: SpikingGraph | None,
    kernels: dict[str, KernelChoice],
    ruled: bool,
) -> LayerDiagnosis:
    record = graph.layers.get(entry.name) if graph is not None else None
    signal = str(record.input_signal) if record is not None and record.input_signal else "unknown"
    runs = kernels.get(entry.name, KernelChoice())
    used = record is None or record.calls > 0 or graph is None or graph.route in _UNRUN
    return LayerDiagnosis(
        name=entry.name,
        weight=entry.shape,
        pattern=str(entry.nm) if entry.nm else None,
        reason=entry.reason,
        signal=signal,
        feeds=record.post if record is not None else (),
        kernel=runs.kernel,
        gain=runs.gain,
        rate=runs.rate,
        advice=_advice(entry, signal, used, ruled, runs.note),
    )


_USUAL = 4  # channels of a block of 2:4
_UNRUN = ("symbolic", "modules")


def _advice(entry: LayerPlan, signal: str, used: bool, ruled: bool, note: str) -> str:
    if "TorchScript" in entry.reason:
        return "hidden in TorchScript: build the model with PYTORCH_JIT=0"
    if not used:
        return "never called in the forward: check the input, or keep it dense by a rule"
    if entry.nm is None and "not a multiple" in entry.reason:
        return "the pattern does not divide its channels: remainder='pad', or a pattern that does"
    if entry.nm is not None and signal == "analog":
        return "sparse but its input is analog: it saves multiplications, not spikes' additions"
    if entry.nm is None and not ruled and entry.shape and entry.shape[1] % _USUAL == 0:
        return "dense by default; a recipe's rule turns it on: {match: NAME, nm: '2:4'}"
    return note if entry.nm is not None else ""


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{platform.machine()} ({capability}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


def _row(layer: LayerDiagnosis) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(map(str, layer.weight)),
        layer.pattern or "dense",
        layer.signal,
        _few(list(layer.feeds)) or "-",
        layer.kernel,
        f"{layer.gain:.2f}x" if layer.gain is not None else "-",
        f"{layer.rate:.1%}" if layer.rate is not None else "-",
        layer.reason,
    )


def _signals(layers: tuple[LayerDiagnosis, ...]) -> str:
    kinds: dict[str, int] = {}
    for layer in layers:
        kinds[layer.signal] = kinds.get(layer.signal, 0) + 1
    return ", ".join(f"{count} layers see {kind} input" for kind, count in kinds.items())


def _speed(layers: tuple[LayerDiagnosis, ...]) -> str:
    """Which kernels run how many layers, and what the N:M ones gain."""
    ways = Counter(layer.kernel for layer in layers)
    gains = [layer.gain for layer in layers if layer.pattern and layer.gain is not None]
    rates = [layer.rate for layer in layers if layer.pattern and layer.rate is not None]
    text = ", ".join(f"{count} layers run as {kernel}" for kernel, count in ways.most_common())
    if not gains:
        return text
    return (
        f"{text}; N:M layers over dense: median {statistics.median(gains):.2f}x, least "
        f"{min(gains):.2f}x, most {max(gains):.2f}x "
        f"(measured here on random input, {statistics.mean(rates or [0]):.0%} of it spikes)"
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
