# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: ratios of things measured in turn in one process, and where they ran."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "add_resuming", "interleaved", "machine", "measured", "positive", "save"]

RESULTS = Path(__file__).parent / "results"


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    statistic: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of each candidate, run in turn so that drifts of the machine hit all alike.

    Args:
        candidates: what to time, by name.
        repeats: counted runs of each.
        warmup: runs of each before that.
        clock: ``time.thread_time`` counts this thread's CPU time alone: for one thread on a
            machine that is shared with other work.
        statistic: of the counted runs; ``min`` where other work disturbs the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in range(warmup + repeats):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            if run >= warmup:
                seconds[name].append(clock() - start)
    return {name: statistic(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    about = _cpuinfo()
    return {
        "cpu": about.get("model name", platform.processor()),
        "cpu family, model": [about.get("cpu family", ""), about.get("model", "")],
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``result`` with the machine beside it as ``folder/name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def positive(text: str) -> int:
    """A whole number from 1 on, as an option of a benchmark.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_resuming(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks that can be run piece by piece; see :func:`measured`."""
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row after this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")


def measured(
    name: str,
    wanted: Mapping[str, Callable[[], dict[str, Any]]],
    about: Mapping[str, Any],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    options: Any,
) -> list[dict[str, Any]]:
    """Measure the rows that an earlier run on this machine has not; save after each.

    Args:
        name: of the result.
        wanted: what measures each row, by a key of the row.
        about: settings; rows that were measured under others are dropped.
        summary: of all rows, saved beside them.
        options: what :func:`add_resuming` has parsed.

    Returns:
        All rows, earlier ones first.
    """
    rows = {row["key"]: row for row in _earlier(name, about, options.out)}
    started = time.perf_counter()
    for key, measure in wanted.items():
        if key in rows and not options.again:
            continue
        if time.perf_counter() - started > options.seconds:
            print(f"not measured in time: {key}; run again to go on")
            break
        rows[key] = {"key": key, **measure()}
        done = list(rows.values())
        save(name, {**about, "summary": summary(done), "rows": done}, options.out)
    return list(rows.values())


def _earlier(name: str, about: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["machine"] != machine() or any(found.get(k) != v for k, v in about.items()):
        return []
    return [row for row in found["rows"] if "key" in row]


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
