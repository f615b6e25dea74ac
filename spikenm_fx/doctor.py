# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what becomes of each layer, what it sees, how it will run, what stands in the way.

Nothing is guessed: the plan decides, the trace tells signals and neurons, and the kernels are timed
on this machine on a copy that is pruned in one shot.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PlanError, SpikeNMError, no_module, some_of
from spikenm_fx.fold import fold
from spikenm_fx.masks.sparsify import sparsify
from spikenm_fx.pack import PackedLayerReport, pack, packing
from spikenm_fx.pattern import NM, PatternLike, Remainder
from spikenm_fx.plan.plan import LayerPlan, Plan, plan
from spikenm_fx.plan.rules import Rule
from spikenm_fx.recipe.waking import firing_rates, rouse, wake
from spikenm_fx.state.copied import deepcopied
from spikenm_fx.state.rest import reset_to_rest
from spikenm_fx.table import text_table
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["Diagnosis", "LayerDiagnosis", "doctor"]


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
        """Plain data, for JSON."""
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
        lines = text_table([_HEAD, *(_row(layer) for layer in self.layers)])
        advice: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.advice:
                advice.setdefault(layer.advice, []).append(layer.name)
        tail = [f"- {text} [{some_of(names, 3)}]" for text, names in advice.items()]
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


Forward = Callable[[nn.Module, Tensor], object]


def doctor(
    model: nn.Module,
    x: Tensor | None = None,
    *,
    nm: PatternLike = "2:4",
    rules: Sequence[Rule] = (),
    remainder: Remainder = "skip",
    forward: Forward | None = None,
    fresh: bool = False,
) -> Diagnosis:
    """Say what becomes of each layer, what it sees, how it runs here, and what stands in the way.

    The model is left as it was.  Kernels are timed on a copy that is pruned in one shot.

    Args:
        model: dense, with the weights that it will have or fresh ones.
        x: one batch, ``[T, B, ...]`` or ``[B, ...]`` as the model takes it; without it neither
            signals nor kernels are known.
        nm: the pattern, as of :func:`spikenm_fx.plan`, like the next two.
        rules: in order.
        remainder: where the pattern does not divide the input channels.
        forward: how one batch runs; by default ``model(x)``.
        fresh: the weights are the constructor's: norms of the copy then see the batch and silent
            neurons are driven harder, because kernels are fastest on a network that never fires.

    Raises:
        PlanError: if nothing could become sparse, or ``model`` is no module.
        PatternError: for a malformed pattern.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(no_module("doctor", model))
    options: dict[str, Any] = {"nm": nm, "rules": tuple(rules), "remainder": remainder}
    run = forward or _call
    blocked: list[str] = []
    graph = _traced(model, x, blocked)
    decided = plan(model, graph=graph, **options)
    runs = graph is not None if x is not None else None
    kernels: dict[str, PackedLayerReport] = {}
    if runs and x is not None:
        kernels = _kernels(model, x, decided, run if fresh else None, blocked)
    helped = _helped_by_rules(model, graph, decided, options)
    return Diagnosis(
        model=decided.model,
        machine=_machine(),
        route=graph.route if graph is not None else "none",
        notes=tuple(str(note) for note in graph.notes) if graph is not None else (),
        neurons=_neurons(graph),
        layers=tuple(
            _layer(entry, graph, kernels.get(entry.name), helped.get(entry.name))
            for entry in decided.layers
        ),
        blocked=tuple(blocked),
        runs=runs,
    )


def _call(model: nn.Module, batch: Tensor) -> object:
    return model(batch)


def _traced(model: nn.Module, x: Tensor | None, blocked: list[str]) -> SpikingGraph | None:
    if x is None:
        blocked.append("no input shape is known: give --input, e.g. --input 4,3,32,32, for signals")
    try:
        return trace(model) if x is None else trace(model, x)
    except SpikeNMError as error:
        blocked.append(f"the model does not run this input, masks still work: {error}")
        return None


def _kernels(
    model: nn.Module, x: Tensor, decided: Plan, wake_by: Forward | None, blocked: list[str]
) -> dict[str, PackedLayerReport]:
    """How layers will run, from a copy that is pruned in one shot; woken first where asked."""
    try:
        twin = deepcopied(model)
        if wake_by is not None:
            _wake(twin, x, wake_by)
        fold(sparsify(twin, decided, method="magnitude"))
        return {layer.name: layer for layer in packing(pack(twin, x)).layers}
    except Exception as error:  # the model's own code may raise anything
        blocked.append(f"kernels could not be tried: {type(error).__name__}: {error}")
        return {}


def _wake(twin: nn.Module, x: Tensor, run: Forward) -> None:
    def once(model: nn.Module) -> object:
        return run(model, x.clone())

    wake(twin, once, reset_to_rest)
    rouse(twin, x, lambda: firing_rates(twin, once, reset_to_rest))
    reset_to_rest(twin)


def _helped_by_rules(
    model: nn.Module, graph: SpikingGraph | None, decided: Plan, options: dict[str, Any]
) -> dict[str, NM]:
    """Dense layers that a rule would make sparse, by really planning with such rules."""
    rules: tuple[Rule, ...] = options["rules"]
    dense = [
        entry.name
        for entry in decided.layers
        if entry.nm is None
        and entry.name
        and "TorchScript" not in entry.reason
        and not any(rule.matches(entry.name, entry.subject(model)) for rule in rules)
    ]
    if not dense:
        return {}
    helped: dict[str, NM] = {}
    for name in dense:
        with contextlib.suppress(PlanError):  # no rule can have an effect on this one
            asked = (*rules, Rule(name))
            tried = plan(model, options["nm"], graph=graph, rules=asked, remainder="skip")
            helped |= {e.name: e.nm for e in tried.sparse if e.name == name and e.nm is not None}
    return helped


def _neurons(graph: SpikingGraph | None) -> dict[str, int]:
    """Neuron layers by framework and class."""
    counts: Counter[str] = Counter()
    for record in graph.neurons.values() if graph is not None else ():
        known = record.spec.framework != "unknown"
        counts[f"{record.spec.framework} " * known + record.spec.class_name] += 1
    return dict(counts)


def _layer(
    entry: LayerPlan,
    graph: SpikingGraph | None,
    packed: PackedLayerReport | None,
    pattern: NM | None,
) -> LayerDiagnosis:
    """One line; ``pattern`` is what a rule could give the layer, where it is dense."""
    record = graph.record(entry.name) if graph is not None else None
    signal = str(record.input_signal) if record is not None and record.input_signal else "unknown"
    used = record is None or record.calls > 0 or graph is None or graph.route in _UNRUN
    note = packed.note if packed is not None and entry.nm is not None else ""
    note = "" if "nothing is to be done" in note.lower() else note
    return LayerDiagnosis(
        name=entry.name,
        weight=entry.shape,
        pattern=str(entry.nm) if entry.nm else None,
        reason=entry.reason,
        signal=signal,
        feeds=record.post if record is not None else (),
        kernel=packed.choice if packed is not None else "-",
        gain=packed.gain if packed is not None else None,
        rate=packed.rate if packed is not None else None,
        advice=_advice(entry, signal, used, pattern) or note,
    )


_UNRUN = ("symbolic", "modules")  # routes that ran nothing: they cannot tell what is never called


def _advice(entry: LayerPlan, signal: str, used: bool, pattern: NM | None) -> str:
    if "TorchScript" in entry.reason:
        return "hidden in TorchScript: build the model with PYTORCH_JIT=0"
    if not used:
        return "never called in the forward: check the input, or keep it dense by a rule"
    if entry.nm is None and "not a multiple" in entry.reason:
        return "the pattern does not divide its channels: remainder='pad', or a pattern that does"
    if entry.nm is not None and signal == "analog":
        return "sparse but its input is analog: it saves multiplications, not spikes' additions"
    if pattern is not None:
        return f"dense by default; a recipe's rule turns it on: {{match: NAME, nm: '{pattern}'}}"
    return ""


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
        some_of(layer.feeds, 3) or "-",
        layer.kernel,
        f"{layer.gain:.2f}x" if layer.gain is not None else "-",
        f"{layer.rate:.1%}" if layer.rate is not None else "-",
        layer.reason,
    )


def _signals(layers: tuple[LayerDiagnosis, ...]) -> str:
    kinds: dict[str, int] = {}
    for layer in layers:
        kinds[layer.signal] = kinds.get(layer.signal, 0) + 1
    return "inputs of layers: " + _counted(kinds)


def _speed(layers: tuple[LayerDiagnosis, ...]) -> str:
    """Which kernels run how many layers, and what the N:M ones gain."""
    ways = Counter(layer.kernel for layer in layers)
    gains = [layer.gain for layer in layers if layer.pattern and layer.gain is not None]
    rates = [layer.rate for layer in layers if layer.pattern and layer.rate is not None]
    text = "layers run as " + ", ".join(f"{kernel} ({n})" for kernel, n in ways.most_common())
    if not gains:
        return text
    return (
        f"{text}; N:M layers over dense: median {statistics.median(gains):.2f}x, least "
        f"{min(gains):.2f}x, most {max(gains):.2f}x "
        f"(measured here; {statistics.mean(rates or [0]):.0%} of what they receive is spikes)"
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
