# SPDX-License-Identifier: Apache-2.0
"""What pack() chooses for single layers, and whether that ever loses: all rates, tiny layers."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from spikenm_fx.bench.layers import Shape, conv, linear, module_of, pruned, shapes
from spikenm_fx.bench.measure import add_resuming, interleaved, measured, positive
from spikenm_fx.pack import native_status, pack, packing, unpack_weight
from spikenm_fx.pattern import NM

__all__ = ["main", "small_shapes"]


def small_shapes() -> Iterator[Shape]:
    """Where calls cost as much as sums do: classifiers, one token, one image."""
    yield linear(1, 16, 16)
    yield linear(8, 64, 10)
    yield linear(1, 512, 512)
    yield linear(1, 4096, 1024)
    yield conv(1, 16, 16, 8, 3)
    yield conv(1, 128, 128, 32, 3)
    yield conv(1, 512, 512, 8, 3)


def main(arguments: list[str]) -> None:
    """Time every layer and its engine, print a table, write ``results/dispatch-Nt.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench dispatch", description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[0.0, 0.05, 0.15, 0.30, 0.50, 1.0]
    )
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute")
    add_resuming(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    one = options.threads == 1
    about = {
        "kernels": list(native_status().levels),
        "clock": "CPU time of the thread, median" if one else "wall, least of the repeats",
        "repeats": options.repeats,
    }
    wanted = {
        f"{shape.name} {pattern} {rate:.0%}": partial(_row, shape, NM.parse(pattern), rate, options)
        for shape in (*shapes(), *small_shapes())
        if options.only in shape.name
        for pattern in options.patterns
        for rate in options.rates
    }
    name = f"dispatch-{options.threads}t" + (f"-busy{options.busy}" if options.busy else "")
    with _busy(options.busy):
        rows = measured(name, wanted, about, _summary, options)
    for line, values in _summary(rows).items():
        print(f"{line:<28} " + "  ".join(f"{key} {value}" for key, value in values.items()))


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """Other processes that keep one core each busy, with matrices that fill its caches."""
    code = "import torch; torch.set_num_threads(1); a = torch.rand(512, 512)\nwhile True: a @ a"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    try:
        time.sleep(5.0 if started else 0.0)  # until they compute
        yield
    finally:
        for process in started:
            process.terminate()
            process.wait()


def _row(shape: Shape, nm: NM, rate: float, options: Any) -> dict[str, Any]:
    """The layer as torch runs it, and the engine that pack() makes of it, on the same tensor."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.weight, generator=generator) / shape.weight[1] ** 0.5
    weight = unpack_weight(pruned(shape, weight, nm, int8=False))
    layer = module_of(shape, weight.clone(memory_format=torch.contiguous_format))
    model = nn.Sequential(layer).eval().requires_grad_(False)
    x = (torch.rand(shape.x, generator=generator) < rate).float()
    engine = pack(model, x)
    report = packing(engine).layers[0]
    with torch.inference_mode():
        seconds = interleaved(
            {"dense": lambda: model(x), "packed": lambda: engine(x)},
            # Calls of microseconds need more of them.
            repeats=max(options.repeats, min(200, int(20 / report.milliseconds["dense"]))),
            warmup=2,
            clock=time.thread_time if options.threads == 1 else time.perf_counter,
            statistic=statistics.median if options.threads == 1 else min,
        )
    row: dict[str, Any] = {
        "shape": shape.name,
        "pattern": str(nm),
        "rate": rate,
        "choice": report.choice,
        "ms": {key: value * 1e3 for key, value in seconds.items()},
        "over_dense": seconds["dense"] / seconds["packed"],
        "ms_at_pack": report.milliseconds,
    }
    print(
        f"{shape.name:<40} {nm!s:>4} {rate:4.0%} dense {row['ms']['dense']:8.4f} ms  "
        f"{report.choice:<6} {row['over_dense']:.2f}x",
        flush=True,
    )
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By rate, and for small layers alone: the ratios, and how often dense was chosen."""
    small = {shape.name for shape in small_shapes()}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        size = "small" if row["shape"] in small else "large"
        groups.setdefault(f"{size} layers, {row['pattern']} at {row['rate']:.0%}", []).append(row)
    return {key: _spread(group) for key, group in groups.items()}


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["over_dense"] for row in rows]
    return {
        "median": round(statistics.median(ratios), 2),
        "least": round(min(ratios), 2),
        "dense": sum(row["choice"] in ("dense", "torch") for row in rows),
        "of": len(rows),
    }
