# SPDX-License-Identifier: Apache-2.0
"""Trace real spiking models: layers, pairs, signals held against measurement, time, memory."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
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
from spikenm_fx.bench.zoo import ZOO, Case, Entry
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import CoupledGroup, SpikingGraph, coupled_groups, trace
from spikenm_fx.trace.groups import permute_members
from spikenm_fx.trace.values import measure_kind

__all__ = ["Row", "main", "measure", "other_order", "train_sparse"]

RESULTS = Path(__file__).parent / "results"
PATIENCE = 900.0
"""Seconds for one model's negative controls, one forward each; what is left is counted."""
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
    _groups_by_permutation(row, case, graph)
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
    """Permute the unfrozen groups: outputs must stay; permuting producers alone must show.

    In float64 to 1e-8; frameworks that know only float32 are held to 1e-4 of the output's range.
    All groups are permuted at once, and halves of them where the outputs do not stay.  What does
    not show where neurons spike rarely is asked again where they spike more often.
    """
    groups = coupled_groups(graph)
    free = [group for group in groups if not group.frozen]
    with _double(case) as (exactly, precise):
        wrong = _wrong(case.model, free, _staying(exactly, precise))
        deadline = time.monotonic() + PATIENCE
        quiet, unasked = _quiet(case.model, free, _staying(exactly, precise), deadline)
        if quiet:
            with _brighter(case.model):
                quiet, late = _quiet(case.model, quiet, _staying(exactly, precise), deadline)
                unasked += late
    row.groups = {
        **{"exact": len(free) - len(wrong), "wrong": len(wrong)},
        **{"frozen": len(groups) - len(free), "quiet": len(quiet), "without control": unasked},
    }


def _staying(case: Case, precise: bool) -> Callable[[], bool]:
    """Asks whether the outputs are still what they are now."""
    before = _outputs(case)
    scale = max((float(t.abs().max()) for t in before), default=0.0) or 1.0
    tolerance = 1e-8 if precise else 1e-4 * scale
    return lambda: _difference(before, _outputs(case)) <= tolerance


def _quiet(
    model: nn.Module, groups: Sequence[CoupledGroup], stays: Callable[[], bool], deadline: float
) -> tuple[list[CoupledGroup], int]:
    """Groups whose producers may be permuted alone unseen, and how many there was no time for."""
    quiet: list[CoupledGroup] = []
    for place, group in enumerate(groups):
        if time.monotonic() > deadline:
            return quiet, len(groups) - place
        with _permuted(model, [group], producers_only=True):
            quiet += [group] if stays() else []
    return quiet, 0


@contextmanager
def _brighter(model: nn.Module) -> Iterator[None]:
    """Norms that shift their channels up: neurons spike more often."""
    norms = [m for m in nn.Module.modules(model) if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    biases = [(norm.bias, norm.bias.detach().clone()) for norm in norms if norm.affine]
    with torch.no_grad():
        for bias, _ in biases:
            bias.add_(0.75)
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, old in biases:
                bias.copy_(old)


def _wrong(
    model: nn.Module, groups: Sequence[CoupledGroup], stays: Callable[[], bool]
) -> list[CoupledGroup]:
    """Those of ``groups`` that change the outputs, by bisection."""
    if not groups:
        return []
    with _permuted(model, groups):
        if stays():
            return []
    if len(groups) == 1:
        return list(groups)
    half = len(groups) // 2
    return [*_wrong(model, groups[:half], stays), *_wrong(model, groups[half:], stays)]


@contextmanager
def _permuted(
    model: nn.Module, groups: Sequence[CoupledGroup], *, producers_only: bool = False
) -> Iterator[None]:
    """Each group's channels in another order, or what its producers make only."""
    orders = [other_order(group.size) for group in groups]

    def reorder(group: CoupledGroup, order: Tensor) -> None:
        members = group.producers if producers_only else group.members
        permute_members(model, group, members, order)

    for group, order in zip(groups, orders, strict=True):
        reorder(group, order)
    try:
        yield
    finally:
        for group, order in zip(groups, orders, strict=True):
            reorder(group, torch.argsort(order))


def other_order(size: int) -> Tensor:
    """A permutation in which no channel keeps its place."""
    mixed = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    order = torch.empty_like(mixed)
    order[mixed] = mixed.roll(1)
    return order


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
        with _coarse(case.model):
            yield case, False
        return
    try:
        yield double, True
    finally:
        torch.set_default_dtype(before)
        case.model.float()


@contextmanager
def _coarse(model: nn.Module) -> Iterator[None]:
    """Weights on a grid of 1/64: sums of spikes are exact in float32, in whatever order."""
    tensors = [p for p in nn.Module.parameters(model) if p.dim() > 1]
    kept = [p.detach().clone() for p in tensors]
    with torch.no_grad():
        for parameter in tensors:
            parameter.copy_((parameter * 64).round() / 64)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(tensors, kept, strict=True):
                parameter.copy_(old)


def _outputs(case: Case) -> list[Tensor]:
    case.reset(case.model)
    with torch.no_grad():
        outputs = [t for t in tree_flatten(case.run())[0] if isinstance(t, Tensor)]
    case.reset(case.model)
    return outputs


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


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


def _one(name: str, build: Callable[[], Case], entry: Entry | None = None) -> Row:
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


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, one line per model."""
    head = (
        "| model | route | layers seen | neurons | paired | spike edges, wrong, missed "
        "| forward CPU ms | trace CPU ms | forward KiB | trace KiB | groups | sparse training |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.error or row.refused:
            text = row.error or f"does not run by itself: {row.refused}"
            lines.append(f"| {row.model} | {text} |" + " |" * 10)
            continue
        lines.append(
            f"| {row.model} | {row.route} | {row.found} of {row.layers} | {row.neurons} "
            f"| {row.paired} | {row.spike_edges}, {row.spike_wrong + row.input_wrong}, "
            f"{row.spike_missed} | {row.eager_ms:.0f} | {row.trace_ms:.0f}"
            f"{'' if row.within_time else ' (over)'} "
            f"| {_kilobytes(row.forward_bytes)} | {_kilobytes(row.trace_bytes)}"
            f"{'' if row.within_memory else ' (over)'} | {_groups(row)} | {row.sparsified} |"
        )
    return "\n".join(lines)


def _kilobytes(count: int) -> str:
    return f"{count / 1024:,.0f}"


def _groups(row: Row) -> str:
    return ", ".join(f"{count} {state}" for state, count in row.groups.items() if count) or "-"


def main(arguments: list[str]) -> int:
    """Measure the models, print the table, and keep it under ``results/``."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.bench trace", description=__doc__)
    parser.add_argument("--only", default="", help="measure models whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS / "trace.json")
    parser.add_argument("--repos", type=Path, help="folder of checkouts of public repositories")
    parser.add_argument("--sites", type=Path, help="folder of old SpikingJelly releases")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
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
    known = {row.model for row in _read(options.output) if not row.error}
    for name, entry in ZOO.items():
        if options.only in name:
            if options.resume and name in known:
                continue
            missing = Row(name, error=f"{entry.framework} is not installed")
            yield _one(name, entry.build, entry) if entry.available else missing
    for name, checkout in REPOS.items() if options.repos else ():
        if options.resume and f"repos/{name}" in known:
            continue
        if options.only in f"repos/{name}" and (options.repos / checkout.folder).is_dir():
            yield _apart(name, options.repos, options.sites)


def _apart(name: str, repos: Path, sites: Path | None) -> Row:
    """Measure a checkout in a process of its own: their modules share names."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, "-m", "spikenm_fx.bench", "trace", "--one", name]
        command += ["--repos", str(repos), "--output", str(output)]
        command += ["--sites", str(sites)] if sites else []
        environment = {**os.environ, "PYTORCH_JIT": "1" if REPOS[name].scripted else "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not output.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no output"]
            return Row(f"repos/{name}", error=last[0][:160])
        return Row(**json.loads(output.read_text())["rows"][0])


def _read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put ``rows`` in place of those of the same models in the JSON, and in the table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {row.model: row for row in (*_read(path), *rows)}
    order = [*ZOO, *(f"repos/{name}" for name in REPOS)]
    kept = sorted(merged.values(), key=lambda row: order.index(row.model))
    report = {"torch": torch.__version__, "rows": [asdict(row) for row in kept]}
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(kept) + "\n")
