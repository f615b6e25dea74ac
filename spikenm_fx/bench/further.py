# SPDX-License-Identifier: Apache-2.0
"""Repositories that nobody here had used: read, decided, folded, packed, held to the model.

One row for each network: what ``trace`` finds beside what is there, which signals it tells wrongly,
how many weights become N:M with and without example inputs, how far the packed engine's output is
from the folded model's, and the times of both.  ``--cases`` also runs a folder of small scripts
that exit with 0 where the library is right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx._torch import tree_flatten
from spikenm_fx.bench.apart import row_apart
from spikenm_fx.bench.measure import RESULTS, machine
from spikenm_fx.bench.nets.further import FURTHER, build_further
from spikenm_fx.bench.tracing import measure
from spikenm_fx.bench.zoo import Case
from spikenm_fx.errors import PlanError
from spikenm_fx.pack import packing
from spikenm_fx.pack.check.difference import difference

__all__ = ["FurtherRow", "main", "row_of"]

TURNS, MOST_TURNS = 21, 201
SECONDS = 6.0  # for more turns than the fewest


@dataclass(slots=True)
class FurtherRow:
    """What became of one network.

    Attributes:
        network: its name.
        repo: where its code is from.
        layers: weights that the trace lists.
        used: those of them that it saw in use.
        neurons: neuron layers that the trace found.
        there: neuron layers that there are.
        edges: edges marked as spikes.
        wrong: edges and layers' inputs marked as spikes that were anything else.
        missed: edges that only ever carried spikes and were marked analog.
        sparse: weights that become N:M with example inputs.
        sparse_without: and without.
        only_without: those that become N:M without them alone, with the reason that the examples
            show for leaving each dense.
        folded: outputs before and after ``fold`` are equal, and ``verify`` finds all blocks valid.
        difference: of the engine's output, relative to the largest value of the model's.
        put_back: layers and neurons that ``pack`` put back to the model's own.
        model_ms: one forward of the folded model, the median of :data:`TURNS` at least; processor
            time.
        engine_ms: one forward of the engine, in turns with the model's, after ``pack`` is done.
        ratio: the median of the turns' ratios of model to engine.
        form: of the engine that was fastest for ``pack``; ``"torch"`` is the model's own code.
        error: what went wrong.
    """

    network: str
    repo: str
    layers: int = 0
    used: int = 0
    neurons: int = 0
    there: int = 0
    edges: int = 0
    wrong: int = 0
    missed: int = 0
    sparse: int = 0
    sparse_without: int = 0
    only_without: dict[str, str] = field(default_factory=dict)
    folded: bool = False
    difference: float = 0.0
    put_back: int = 0
    model_ms: float = 0.0
    engine_ms: float = 0.0
    ratio: float = 0.0
    form: str = ""
    error: str = ""


def row_of(name: str, repos: Path) -> FurtherRow:
    """Take one network the whole way, in this process.

    Args:
        name: key of :data:`~spikenm_fx.bench.nets.further.FURTHER`.
        repos: folder of checkouts.
    """
    entry = FURTHER[name]
    row = FurtherRow(name, entry.repo, there=entry.neurons)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = build_further(name, repos)
            _read(row, case)
            _pack(row, case)
        except Exception as error:
            row.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    return row


def _read(row: FurtherRow, case: Case) -> None:
    traced = measure(row.network, case, seeds=2, timed=False)
    row.layers, row.used, row.neurons = traced.layers, traced.found, traced.neurons
    row.edges, row.missed = traced.spike_edges, traced.spike_missed
    row.wrong = traced.spike_wrong + traced.input_wrong
    shown = spikenm_fx.plan(case.model, "2:4", example_inputs=case.inputs)
    row.sparse = len(shown.sparse)
    try:
        without = {entry.name for entry in spikenm_fx.plan(case.model, "2:4").sparse}
    except PlanError:
        without = set()
    row.sparse_without = len(without)
    dense = {entry.name: entry.reason for entry in shown.layers if not entry.nm}
    row.only_without = {name: dense[name] for name in sorted(without & set(dense))}


def _pack(row: FurtherRow, case: Case) -> None:
    model = case.model
    plan = spikenm_fx.plan(model, "2:4", example_inputs=case.inputs)
    spikenm_fx.sparsify(model, plan, method="magnitude")
    before = _output(case, model)
    spikenm_fx.fold(model)
    after = _output(case, model)
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    row.folded = same and spikenm_fx.verify(model, plan).valid
    case.reset(model)
    engine = spikenm_fx.pack(model, case.inputs)
    given = _output(case, engine)
    row.difference = max(difference(a, b) for a, b in zip(given, after, strict=True))
    report = packing(engine)
    row.put_back = len(report.proof.put_back) if report.proof is not None else 0
    row.form = report.whole.form if report.whole is not None else ""
    _race(row, case, model, engine)


def _race(row: FurtherRow, case: Case, model: nn.Module, engine: nn.Module) -> None:
    """Time both in turns, each of them first in every other one; states go on from turn to turn."""
    spent: dict[str, list[float]] = {"model": [], "engine": []}
    ways = {"model": model, "engine": engine}
    for each in ways.values():
        case.reset(each)
    start = time.perf_counter()
    with torch.no_grad():
        for turn in range(-2, MOST_TURNS):
            if turn >= TURNS and time.perf_counter() - start > SECONDS:
                break
            for way in sorted(ways, reverse=bool(turn % 2)):
                began = time.thread_time()
                ways[way](*case.inputs)
                if turn >= 0:
                    spent[way].append(time.thread_time() - began)
    row.model_ms, row.engine_ms = (1e3 * statistics.median(spent[way]) for way in ways)
    row.ratio = statistics.median(m / e for m, e in zip(*spent.values(), strict=True))


def _output(case: Case, model: Any) -> list[Tensor]:
    case.reset(model)
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(*(x.clone() for x in case.inputs))
    return [t.clone() for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


def _apart(name: str, options: argparse.Namespace) -> FurtherRow:
    arguments = ["--one", name, "--repos", str(options.repos.resolve())]
    row = row_apart("further", arguments, seconds=options.seconds)
    return (
        FurtherRow(name, FURTHER[name].repo, error=row)
        if isinstance(row, str)
        else FurtherRow(**row)
    )


def _case(script: Path) -> bool:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, check=False)
    return done.returncode == 0


def main(arguments: Sequence[str]) -> int:
    """Measure each network whose checkout is there, and keep the rows under ``results/``."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.bench further", description=__doc__)
    parser.add_argument("--repos", type=Path, required=True, help="folder of checkouts")
    parser.add_argument("--cases", type=Path, help="folder of scripts that exit with 0 if right")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--seconds", type=float, default=600.0, help="for one network, at most")
    parser.add_argument("--output", type=Path, default=RESULTS / "further.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        options.output.write_text(json.dumps(asdict(row_of(options.one, options.repos))))
        return 0
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = {row["network"]: row for row in known.get("rows", ())}
    for name in (name for name in FURTHER if options.only in name):
        row = _apart(name, options)
        rows[name] = asdict(row)
        print(name, row.error or f"{row.sparse} of {row.layers} sparse", flush=True)
        cases = known.get("cases", {})
        if options.cases is not None:
            cases = {f.stem: _case(f) for f in sorted(options.cases.glob("[!c]*_*.py"))}
            options.cases = None
        order = [rows[name] for name in FURTHER if name in rows]
        known = {"machine": machine(), "cases": cases, "rows": order}
        options.output.write_text(json.dumps(known, indent=1) + "\n")
    return int(any(row["error"] for row in rows.values()))
