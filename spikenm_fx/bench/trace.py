# SPDX-License-Identifier: Apache-2.0
"""Trace real spiking models: layers, pairs, signals held against measurement, time, memory."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from spikenm_fx.bench.apart import row_apart
from spikenm_fx.bench.repos import REPOS
from spikenm_fx.bench.repos import build as build_checkout
from spikenm_fx.bench.tracing import Row, row_of
from spikenm_fx.bench.zoo import ZOO

__all__ = ["main", "table", "write"]

RESULTS = Path(__file__).parent / "results"


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
        write(options.output, [row_of(f"repos/{options.one}", build)])
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
            yield row_of(name, entry.build, entry) if entry.available else missing
    for name, checkout in REPOS.items() if options.repos else ():
        if options.resume and f"repos/{name}" in known:
            continue
        if options.only in f"repos/{name}" and (options.repos / checkout.folder).is_dir():
            yield _apart(name, options.repos, options.sites)


def _apart(name: str, repos: Path, sites: Path | None) -> Row:
    arguments = ["--one", name, "--repos", str(repos)]
    arguments += ["--sites", str(sites)] if sites else []
    found = row_apart("trace", arguments, scripted=REPOS[name].scripted)
    if isinstance(found, str):
        return Row(f"repos/{name}", error=found)
    return Row(**found["rows"][0])


def _read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put ``rows`` in place of those of the same models in the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {row.model: row for row in (*_read(path), *rows)}
    order = [*ZOO, *(f"repos/{name}" for name in REPOS)]
    kept = sorted(merged.values(), key=lambda row: order.index(row.model))
    report = {"torch": torch.__version__, "rows": [asdict(row) for row in kept]}
    path.write_text(json.dumps(report, indent=1) + "\n")
