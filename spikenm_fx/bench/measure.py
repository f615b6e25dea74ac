# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: ratios of things measured in turn in one process, and where they ran."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "interleaved", "machine", "save"]

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
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _cpuinfo()
            if line.startswith(("model name", "Model name"))
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
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


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
