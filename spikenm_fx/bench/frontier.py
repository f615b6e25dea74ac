# SPDX-License-Identifier: Apache-2.0
"""At equal bytes: dense networks of several widths and sparse ones, same training; resumable."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikenm_fx.bench import accuracy
from spikenm_fx.bench.measure import RESULTS, save
from spikenm_fx.bench.nets.cifar import WIDE
from spikenm_fx.bench.training import Run, train

__all__ = ["gain_at_a_quarter", "main", "plot"]

WIDTHS = (0.5, 0.7, 1.0, 1.4, 2.0)
SPARSE = ("2:4", "2:8", "1:8", "0.25 bytes")


def main(arguments: Sequence[str]) -> None:
    """Train what is missing, print and write accuracy, packed bytes and operations of each."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench frontier", description=__doc__)
    accuracy.add_options(parser)
    parser.add_argument("--widths", nargs="+", type=float, default=list(WIDTHS))
    parser.add_argument("--sparse-widths", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--method", default="spikenm", help="of the sparse networks")
    parser.set_defaults(patterns=list(SPARSE), seeds=[0], results=RESULTS, network="vgg-tiny")
    options = parser.parse_args(arguments)
    if options.network not in WIDE:
        parser.error(f"--network must be one of {sorted(WIDE)}, which come in widths")
    options.name = options.name or Path(options.data).name
    torch.set_num_threads(options.threads)
    data, base = accuracy.setting(options)
    out: Path = options.out or Path("bench-runs") / f"frontier-{options.name}"
    rows = []
    runs = _runs(base, options)
    if options.finished:
        runs = [run for run in runs if (out / f"{run.name}.json").exists()]
    for number, run in enumerate(runs, 1):
        where = f"{number}/{len(runs)} {run.name}"
        row = train(run, data, out, partial(accuracy.progress, where, run.epochs))
        rows.append(row)
        print(f"\r{where}: {row['accuracy']:.2%}, {row['packed_bytes']:,} bytes" + " " * 20)
    table = summary(rows)
    result = {"settings": accuracy.shared(rows) | {"method": options.method}, "rows": table}
    print(save(f"frontier-{options.name}", result, options.results))
    plot(table, options.results / f"frontier-{options.name}.png")


def _runs(base: Run, options: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that an interrupted bench has whole curves."""
    found = []
    for seed in options.seeds:
        for width in options.widths:
            network = f"{options.network}-x{width:g}"
            found.append(replace(base, network=network, seed=seed))
        for width in options.sparse_widths:
            for pattern in options.patterns:
                network = f"{options.network}-x{width:g}"
                found.append(
                    replace(
                        *(base,),
                        **{"network": network, "seed": seed},
                        **{"method": options.method, "pattern": pattern},
                    )
                )
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each network: width, pattern, accuracies of the seeds, bytes, operations."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["run"]["network"], row["run"]["pattern"]].append(row)
    return [
        {
            "width": float(network.rpartition("-x")[2]),
            "pattern": pattern,
            "accuracies": [member["accuracy"] for member in members],
            "mean": statistics.mean(member["accuracy"] for member in members),
            "packed_bytes": members[0]["packed_bytes"],
            "synops": statistics.mean(member["synops"] for member in members),
        }
        for (network, pattern), members in groups.items()
    ]


def _at(rows: Sequence[Mapping[str, Any]], key: str, place: float) -> float:
    """The mean accuracy on the line through ``rows`` at ``place``, level beyond its ends."""
    points = sorted((row[key], row["mean"]) for row in rows)
    places, means = zip(*points, strict=True)
    return float(np.interp(place, places, means))


def gain_at_a_quarter(table: Sequence[Mapping[str, Any]]) -> tuple[float, str, float] | None:
    """By how much the best sparse network of at most a quarter of the bytes of width 1 leads.

    Returns:
        lead over the line through the dense networks at the bytes of that network, its pattern and
        its width; None where no sparse one is as small.
    """
    dense = [row for row in table if row["pattern"] == "dense"]
    whole = next(row["packed_bytes"] for row in dense if row["width"] == 1)
    leads = [
        (row["mean"] - _at(dense, "packed_bytes", size), row["pattern"], row["width"])
        for row in table
        if row["pattern"] != "dense" and (size := row["packed_bytes"]) <= 0.27 * whole  # about
    ]
    return max(leads, default=None)


def plot(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over packed bytes and over operations, dense and sparse."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    shown = (("packed_bytes", "bytes of all weights, packed"), ("synops", "operations a sample"))
    for axis, (key, words) in zip(axes, shown, strict=True):
        for pattern in dict.fromkeys(row["pattern"] for row in table):
            rows = sorted((r for r in table if r["pattern"] == pattern), key=lambda r: r[key])
            axis.plot(
                [row[key] for row in rows],
                [100 * row["mean"] for row in rows],
                marker="o",
                linestyle="-" if pattern == "dense" else "--",
                label=pattern,
            )
        axis.set_xscale("log")
        axis.set_xlabel(words)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
