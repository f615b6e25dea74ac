# SPDX-License-Identifier: Apache-2.0
"""Whole spiking networks as one program each, against torch and the engine without, T=4."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from spikenm_fx.bench.measure import add_resuming, interleaved, measured, positive
from spikenm_fx.bench.network import classes_of, compiled_copy, from_rest
from spikenm_fx.bench.subjects import NETWORKS, calibrate_rates, prune
from spikenm_fx.pack import pack
from spikenm_fx.pattern import NM
from spikenm_fx.program import Engine

__all__ = ["main"]

OTHERS = ("eager", "compiled", "engine")


def main(arguments: list[str]) -> None:
    """Time every network and write ``results/programs-Nt.json``, row by row."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench programs", description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--rate", type=float, default=0.1, help="firing rate to calibrate to")
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    add_resuming(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    one = options.threads == 1
    about = {
        "clock": "CPU time of the thread, median" if one else "wall, least of the repeats",
        "repeats": options.repeats,
    }
    wanted = {
        f"{name} {pattern} batch {batch} rate {options.rate:.0%}": partial(
            _row, name, NM.parse(pattern), batch, options
        )
        for batch, name, pattern in itertools.product(
            options.batches, options.only, options.patterns
        )
    }
    rows = measured(f"programs-{options.threads}t", wanted, about, _summary, options)
    for key, value in _summary(rows).items():
        print(f"{key}: geometric mean {value['mean']:.2f}x, least {value['least']:.2f}x")


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric mean and least ratio of each batch size over each of the others."""
    summary = {}
    for batch, other in itertools.product(sorted({row["batch"] for row in rows}), OTHERS):
        ratios = [row[f"over_{other}"] for row in rows if row["batch"] == batch]
        mean = statistics.geometric_mean(ratios)
        summary[f"batch {batch} over {other}"] = {"mean": mean, "least": min(ratios)}
    return summary


def _row(name: str, nm: NM, batch: int, options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()  # else it gives up compiling after a few rows
    network = NETWORKS[name]()
    prune(network.model, nm)
    x = network.inputs(batch)
    rates = calibrate_rates(network, network.inputs(4), options.rate)
    program = pack(network.model, x, program=True)
    modules: dict[str, nn.Module] = {
        "eager": network.model,
        "compiled": compiled_copy(network, x),
        "engine": pack(network.model, x),
        "program": program,
    }
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {
            key: from_rest(network, module, x) for key, module in modules.items()
        }
        answers = {key: classes_of(call()) for key, call in calls.items()}
        seconds = interleaved(
            calls,
            repeats=options.repeats,
            clock=time.thread_time if options.threads == 1 else time.perf_counter,
            statistic=statistics.median if options.threads == 1 else min,
        )
    row = {
        "network": name,
        "pattern": str(nm),
        "batch": batch,
        "rate": rates["mean"],
        "whole": isinstance(program, Engine),
        "ms": {key: 1e3 * value for key, value in seconds.items()},
        "same_answers": float((answers["program"] == answers["eager"]).float().mean()),
    }
    row |= {f"over_{other}": seconds[other] / seconds["program"] for other in OTHERS}
    times = "  ".join(f"{key} {1e3 * value:.1f}" for key, value in seconds.items())
    ratios = "  ".join(f"{other} {row[f'over_{other}']:.2f}x" for other in OTHERS)
    print(f"{name:<18} {nm} batch {batch:<3} ms: {times}  program over {ratios}", flush=True)
    return row
