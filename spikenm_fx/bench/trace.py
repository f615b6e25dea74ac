# SPDX-License-Identifier: Apache-2.0
"""Trace real spiking models: layers, pairs, signals held against measurement, time, memory."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten

import spikenm_fx
from spikenm_fx.bench.repos import REPOS
from spikenm_fx.bench.repos import build as build_checkout
from spikenm_fx.bench.zoo import ZOO, Case
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import SpikingGraph, coupled_groups, permute_channels, trace
from spikenm_fx.trace.groups import permute_members
from spikenm_fx.trace.values import measure_kind

__all__ = ["Row", "main", "measure", "train_sparse"]

RESULTS = Path(__file__).parent / "results"


@dataclass(slots=True)
class Row:
    """What was found, and measured, on one model.

    Attributes:
        model: its name.
        route: how it was read.
        layers: weight modules in the tree.
        found: those that the graph saw in use.
        neurons: neurons found.
        paired: layers with at least one source and one neuron, or marked readout.
        chains: one-to-one layer -> norm -> neuron chains.
        spike_edges: edges marked spike, and those among them that carried anything else.
        spike_wrong: those among them that carried anything but {0,1} in a real forward.
        spike_missed: edges marked analog that only carried {0,1}.
        input_wrong: layers whose input was marked spike but was not, measured by plain hooks.
        silent: layers whose input was constant in all measured forwards: nothing is proven there.
        groups: coupled groups: permuted exactly, wrongly, frozen; and how many of the exact ones a
            permutation of their producers alone did not show (quiet channels).
        eager_ms: one eager forward, median.
        trace_ms: one trace, median.
        memory_ratio: peak bytes of a trace over those of a forward, parameters counted in both.
        sparsified: outcome of sparsify, one training step, fold and verify.
        notes: the graph's notes.
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
    memory_ratio: float = 0.0
    sparsified: str = ""
    notes: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def within_time(self) -> bool:
        """At most three eager forwards and a second."""
        return self.trace_ms <= 3 * self.eager_ms + 1000


def measure(name: str, case: Case, *, seeds: int = 3, timed: bool = True) -> Row:
    """Trace one model and hold what the graph says against real forwards."""
    graph = trace(case.model, case.inputs)
    weights = {n for n, m in case.model.named_modules() if is_weight_layer(m)}
    records = [graph.layers[n] for n in weights]
    row = Row(
        name,
        route=graph.route,
        layers=len(weights),
        found=sum(r.calls > 0 for r in records),
        neurons=len(graph.neurons),
        paired=sum(bool(r.pre) and bool(r.post or r.is_readout or r.feeds) for r in records),
        chains=len(graph.chains),
        notes=[str(note) for note in graph.notes],
    )
    _edges_by_measurement(row, case, graph, seeds)
    _inputs_by_measurement(row, case, graph, seeds)
    _groups_by_permutation(row, case, graph)
    if timed:
        _times(row, case)
        row.memory_ratio = round(_memory(case), 2)
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
        for u, v, data in measured.edges(data=True):
            seen.setdefault((u, v), set()).update(data["measured"])
    for edge, kinds in seen.items():
        if edge not in graph.edges:
            continue
        marked = graph.edges[edge]["signal"].kind
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


def _groups_by_permutation(row: Row, case: Case, graph: SpikingGraph) -> None:
    """Permute every unfrozen group: outputs must stay; permuting producers alone must show.

    In float64 to 1e-8; frameworks that know only float32 are held to 1e-4 of the output's range.
    """
    with _double(case) as (exactly, precise):
        before = _outputs(exactly)
        scale = max((float(t.abs().max()) for t in before), default=0.0) or 1.0
        tolerance = 1e-8 if precise else 1e-4 * scale
        counts = {"exact": 0, "wrong": 0, "frozen": 0, "quiet": 0}
        for group in coupled_groups(graph):
            if group.frozen:
                counts["frozen"] += 1
                continue
            order = torch.randperm(group.size, generator=torch.Generator().manual_seed(1)).roll(1)
            back = torch.argsort(order)
            permute_channels(case.model, group, order)
            exact = _difference(before, _outputs(exactly)) <= tolerance
            permute_channels(case.model, group, back)
            counts["exact" if exact else "wrong"] += 1
            permute_members(case.model, group, group.producers, order)
            counts["quiet"] += _difference(before, _outputs(exactly)) <= tolerance
            permute_members(case.model, group, group.producers, back)
    row.groups = counts


@contextmanager
def _double(case: Case) -> Iterator[tuple[Case, bool]]:
    """The same case in float64, and whether that works."""
    before = torch.get_default_dtype()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs)
    double = Case(case.model, inputs, case.reset)
    try:
        torch.set_default_dtype(torch.float64)
        case.model.double()
        _outputs(double)
    except RuntimeError:  # the framework makes float32 tensors of its own
        torch.set_default_dtype(before)
        case.model.float()
        case.reset(case.model)
        yield case, False
        return
    try:
        yield double, True
    finally:
        torch.set_default_dtype(before)
        case.model.float()


def _outputs(case: Case) -> list[Tensor]:
    case.reset(case.model)
    with torch.no_grad():
        outputs = [t for t in tree_flatten(case.run())[0] if isinstance(t, Tensor)]
    case.reset(case.model)
    return outputs


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _times(row: Row, case: Case, repeats: int = 5) -> None:
    """Interleaved, medians: both see the same disturbances."""
    eager, traced = [], []
    for _ in range(repeats):
        eager.append(_milliseconds(lambda: _forward(case)))
        traced.append(_milliseconds(lambda: trace(case.model, case.inputs)))
    row.eager_ms = round(statistics.median(eager), 1)
    row.trace_ms = round(statistics.median(traced), 1)


def _forward(case: Case) -> None:
    with torch.no_grad():
        case.run()
    case.reset(case.model)


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _memory(case: Case) -> float:
    # torch's own methods: rockpool gives parameters() another meaning
    tensors = (*nn.Module.parameters(case.model), *nn.Module.buffers(case.model))
    own = sum(t.numel() * t.element_size() for t in tensors)
    forward = _peak(lambda: _forward(case))
    traced = _peak(lambda: trace(case.model, case.inputs))
    return (own + traced) / (own + forward)


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


def _one(name: str, build: Callable[[], Case]) -> Row:
    try:
        with _quietly():
            row = measure(name, build())
            row.sparsified = train_sparse(build)
            return row
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        return Row(name, error=f"{type(error).__name__}: {text}")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, one line per model."""
    head = (
        "| model | route | layers seen | neurons | paired | spike edges, wrong, missed "
        "| forward ms | trace ms | memory | groups | sparse training |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.error:
            lines.append(f"| {row.model} | {row.error} |" + " |" * 9)
            continue
        lines.append(
            f"| {row.model} | {row.route} | {row.found} of {row.layers} | {row.neurons} "
            f"| {row.paired} | {row.spike_edges}, {row.spike_wrong + row.input_wrong}, "
            f"{row.spike_missed} | {row.eager_ms:.0f} | {row.trace_ms:.0f} "
            f"| {row.memory_ratio:.2f}x | {_groups(row)} | {row.sparsified} |"
        )
    return "\n".join(lines)


def _groups(row: Row) -> str:
    return ", ".join(f"{count} {state}" for state, count in row.groups.items() if count) or "-"


def main(arguments: list[str]) -> int:
    """Measure the models, print the table, and keep it under ``results/``."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.bench trace", description=__doc__)
    parser.add_argument("--only", default="", help="measure models whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS / "trace.json")
    parser.add_argument("--repos", type=Path, help="folder of checkouts of public repositories")
    parser.add_argument("--sites", type=Path, help="folder of old SpikingJelly releases")
    parser.add_argument("--one", help="measure this checkout, in this process")
    options = parser.parse_args(arguments)
    if options.one:
        build = functools.partial(build_checkout, options.one, options.repos, options.sites)
        write(options.output, [_one(f"repos/{options.one}", build)])
        return 0
    failed = False
    for row in _rows(options):
        print(table([row]).splitlines()[-1], flush=True)
        write(options.output, [row])
        failed |= bool(row.error)
    return int(failed)


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for name, entry in ZOO.items():
        if options.only in name:
            missing = Row(name, error=f"{entry.framework} is not installed")
            yield _one(name, entry.build) if entry.available else missing
    for name, checkout in REPOS.items() if options.repos else ():
        if options.only in f"repos/{name}" and (options.repos / checkout.folder).is_dir():
            yield _apart(name, options.repos, options.sites)


def _apart(name: str, repos: Path, sites: Path | None) -> Row:
    """Measure a checkout in a process of its own: their modules share names."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, "-m", "spikenm_fx.bench", "trace", "--one", name]
        command += ["--repos", str(repos), "--output", str(output)]
        command += ["--sites", str(sites)] if sites else []
        # SpikeGPT's scripted modules hide their layers; torch runs them as written without JIT
        environment = {**os.environ, "PYTORCH_JIT": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not output.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no output"]
            return Row(f"repos/{name}", error=last[0][:160])
        return Row(**json.loads(output.read_text())["rows"][0])


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put ``rows`` in place of those of the same models in the JSON, and in the table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {row["model"]: Row(**row) for row in known} | {row.model: row for row in rows}
    order = [*ZOO, *(f"repos/{name}" for name in REPOS)]
    kept = sorted(merged.values(), key=lambda row: order.index(row.model))
    report = {"torch": torch.__version__, "rows": [asdict(row) for row in kept]}
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(kept) + "\n")
