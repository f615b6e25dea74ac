# SPDX-License-Identifier: Apache-2.0
"""What a trace says of one model, held against measurement: signals, groups, time, memory."""

from __future__ import annotations

import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import spikenm_fx
from spikenm_fx._torch import tree_flatten
from spikenm_fx.bench.permutation import count_groups
from spikenm_fx.bench.zoo import Case, Entry
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import SpikingGraph, trace
from spikenm_fx.trace.execution.values import measure_kind

__all__ = ["Row", "measure", "refusal", "row_of", "train_sparse"]

ALLOWED_BYTES = 16 * 1024
"""What a trace may take beside twice a forward: as the second beside thrice its time."""


@dataclass(slots=True)
class Row:
    """What was found, and measured, on one model.

    Attributes:
        model: its name.
        route: how it was read.
        layers: weight modules in the tree, and raw weights.
        found: those that the graph saw in use.
        neurons: neurons found.
        paired: layers with at least one source and one neuron, or marked readout.
        chains: one-to-one layer -> norm -> neuron chains.
        spike_edges: edges marked spike, and those among them that carried anything else.
        spike_wrong: those among them that carried anything but {0,1} in a real forward.
        spike_missed: edges marked analog that only carried {0,1}.
        input_wrong: layers whose input was marked spike but was not, measured by plain hooks.
        silent: layers whose input was constant in all measured forwards: nothing is proven there.
        groups: coupled groups: permuted exactly, wrongly, frozen; how many of the free ones a
            permutation of their producers alone did not show (quiet channels), and for how many
            there was no time to ask.
        eager_ms: processor time of one eager forward on one thread, median.
        trace_ms: processor time of one trace on one thread, median.
        forward_bytes: most bytes alive at once in a forward, beyond the model's own.
        trace_bytes: the same of a trace.
        sparsified: outcome of sparsify, one training step, fold and verify.
        notes: the graph's notes.
        error: what went wrong.
        refused: the framework's own error where its model cannot run this way.
    """

    model: str
    route: str = ""
    layers: int = 0
    found: int = 0
    neurons: int = 0
    paired: int = 0
    chains: int = 0
    spike_edges: int = 0
    spike_wrong: int = 0
    spike_missed: int = 0
    input_wrong: int = 0
    silent: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    eager_ms: float = 0.0
    trace_ms: float = 0.0
    forward_bytes: int = 0
    trace_bytes: int = 0
    sparsified: str = ""
    notes: list[str] = field(default_factory=list)
    error: str = ""
    refused: str = ""

    @property
    def within_memory(self) -> bool:
        """At most two forwards and 16 KiB; see :func:`spikenm_fx.trace`."""
        return self.trace_bytes <= 2 * self.forward_bytes + ALLOWED_BYTES

    @property
    def within_time(self) -> bool:
        """At most three eager forwards and a second."""
        return self.trace_ms <= 3 * self.eager_ms + 1000


def measure(name: str, case: Case, *, seeds: int = 3, timed: bool = True) -> Row:
    """Trace one model and hold what the graph says against real forwards."""
    graph = trace(case.model, case.inputs)
    weights = {n for n, m in case.model.named_modules() if is_weight_layer(m)}
    records = [r for n, r in graph.layers.items() if n in weights or r.kind == "functional"]
    row = Row(
        name,
        route=graph.route,
        layers=len(records),
        found=sum(r.calls > 0 for r in records),
        neurons=len(graph.neurons),
        paired=sum(bool(r.pre) and bool(r.post or r.is_readout or r.feeds) for r in records),
        chains=len(graph.chains),
        notes=[str(note) for note in graph.notes],
    )
    _edges_by_measurement(row, case, graph, seeds)
    _inputs_by_measurement(row, case, graph, seeds)
    row.groups = count_groups(case, graph)
    if timed:
        _times(row, case)
        row.forward_bytes = _peak(lambda: _forward(case))
        row.trace_bytes = _peak(lambda: trace(case.model, case.inputs))
    return row


def _variants(inputs: Sequence[Tensor], seeds: int) -> Iterator[tuple[Tensor, ...]]:
    """The example, and others of its shape, scale and kind."""
    yield tuple(inputs)
    for seed in range(1, seeds):
        generator = torch.Generator().manual_seed(seed)
        yield tuple(
            x.reshape(-1)[torch.randperm(x.numel(), generator=generator)].reshape(x.shape)
            * (1 if not x.is_floating_point() or measure_kind(x)[0] != "analog" else 0.5 + seed / 2)
            for x in inputs
        )


def _edges_by_measurement(row: Row, case: Case, graph: SpikingGraph, seeds: int) -> None:
    seen: dict[tuple[str, str], set[str]] = {}
    for inputs in _variants(case.inputs, seeds):
        measured = trace(case.model, inputs, measure=True)
        for u, v, data in measured.nx.edges(data=True):
            seen.setdefault((u, v), set()).update(data["measured"])
    for edge, kinds in seen.items():
        if edge not in graph.nx.edges:
            continue
        marked = graph.nx.edges[edge]["signal"].kind
        row.spike_edges += marked == "spike"
        row.spike_wrong += marked == "spike" and bool(kinds - {"spike"})
        row.spike_missed += marked == "analog" and kinds == {"spike"}


def _inputs_by_measurement(row: Row, case: Case, graph: SpikingGraph, seeds: int) -> None:
    """Plain hooks on the layers, independent of any tracing."""
    kinds: dict[str, set[str]] = {}
    handles = []
    for name, module in case.model.named_modules():
        if not is_weight_layer(module):
            continue

        def look(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            kind, varied = measure_kind(args[0])
            kinds.setdefault(name, set()).update({kind} if kind and varied else set())

        handles.append(module.register_forward_pre_hook(look))
    try:
        for inputs in _variants(case.inputs, seeds):
            case.reset(case.model)
            with torch.no_grad():
                case.model(*(x.clone() for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
        case.reset(case.model)
    for name, seen in kinds.items():
        signal = graph.layers[name].input_signal
        row.silent += not seen
        if signal is not None and signal.kind == "spike":
            row.input_wrong += bool(seen - {"spike"})


def _times(row: Row, case: Case, repeats: int = 3) -> None:
    """Interleaved, medians: both see the same disturbances."""
    eager, traced = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats):
        eager.append(_milliseconds(lambda: _forward(case)))
        traced.append(_milliseconds(lambda: trace(case.model, case.inputs)))
    torch.set_num_threads(threads)
    row.eager_ms = round(statistics.median(eager), 1)
    row.trace_ms = round(statistics.median(traced), 1)


def _forward(case: Case) -> None:
    with torch.no_grad():
        case.run()
    case.reset(case.model)


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()  # of this process alone: other load on the machine is left out
    call()
    return (time.process_time() - start) * 1e3


def _peak(call: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at once during ``call``, beyond those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda e: int(e.start_ns())
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def train_sparse(build: Callable[[], Case]) -> str:
    """Sparsify the model, train one step, fold, verify: what a user does next."""
    try:
        case = build()  # not a copy: some frameworks' deepcopy does not work
        model = case.model.train()
        every = (spikenm_fx.Rule("re:.*", nm="2:4"),)  # head and input layer included
        decided = spikenm_fx.plan(
            model, "2:4", example_inputs=case.inputs, rules=every, remainder="pad"
        )
        spikenm_fx.sparsify(model, "2:4", example_inputs=case.inputs, rules=every, remainder="pad")
        optimizer = torch.optim.SGD(
            [p for p in nn.Module.parameters(model) if p.requires_grad], lr=1e-2
        )
        outputs = [t for t in tree_flatten(case.run())[0] if isinstance(t, Tensor)]
        losses = [t.float().square().mean() for t in outputs if t.requires_grad]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
        case.reset(model)
        spikenm_fx.fold(model)
        return "ok" if spikenm_fx.verify(model, decided).valid else "not N:M"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refusal(entry: Entry) -> str:
    """The framework's own error on a model that it cannot run in this mode.

    Raises:
        AssertionError: if the model runs, or fails otherwise than it is known to.
    """
    case = entry.build()
    try:
        case.run()
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        assert re.search(entry.refuses, text), text
        return text
    raise AssertionError("this model was thought not to run")


def row_of(name: str, build: Callable[[], Case], entry: Entry | None = None) -> Row:
    """All that is measured on one model; an error is part of it.

    Args:
        name: of the model.
        build: makes it.
        entry: its place in the zoo, which knows whether it refuses to run.
    """
    try:
        with _quietly():
            if entry is not None and entry.refuses:
                return Row(name, refused=refusal(entry))
            row = measure(name, build())
            row.sparsified = train_sparse(build)
            return row
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        return Row(name, error=f"{type(error).__name__}: {text}")
