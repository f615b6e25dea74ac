# SPDX-License-Identifier: Apache-2.0
"""Every method on the same network, data, budget, optimizer and seeds; resumable."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spikenm_fx.bench.data import cifar10, shrunk
from spikenm_fx.bench.measure import RESULTS, positive, save
from spikenm_fx.bench.nets.cifar import NETWORKS
from spikenm_fx.bench.shapes import moving_shapes
from spikenm_fx.bench.training import VARIANTS, Run, train
from spikenm_fx.demo.data import Split, digits
from spikenm_fx.masks import native
from spikenm_fx.pattern import NM

__all__ = ["add_options", "main", "plot", "progress", "setting", "shared", "summary"]

METHODS = ("dense", "random", "magnitude", "srste", "maskllm", "spikenm-no-eid", "spikenm")
NEIGHBOURS = ("cyclical", "regrow", "activity", "uticket")


def main(arguments: Sequence[str]) -> None:
    """Train what is missing, print mean and standard deviation, write JSON and a plot."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    data, base = setting(options)
    out: Path = options.out or Path("bench-runs") / options.name
    rows = []
    runs = _runs(base, options.methods, options.patterns, options.seeds)
    if options.finished:
        runs = [run for run in runs if (out / f"{run.name}.json").exists()]
    for number, run in enumerate(runs, 1):
        where = f"{number}/{len(runs)} {run.name}"
        row = train(run, data, out, partial(progress, where, run.epochs))
        rows.append(row)
        print(f"\r{where}: {row['accuracy']:.2%}" + " " * 30)
    table = summary(rows)
    print(_text(table))
    result = {"settings": shared(rows), "sampler": _sampler(), "rows": table}
    print(save(f"accuracy-{options.name}", result, options.results))
    shown = f"{options.network}, {base.data['source']}, {base.data['train']:,} training images"
    plot(table, options.results / f"accuracy-{options.name}.png", shown)


def setting(options: argparse.Namespace) -> tuple[Split, Run]:
    """The data, and the dense run that all others differ from."""
    data, described = _data(options)
    run = Run(
        "dense",
        "dense",
        0,
        network=options.network,
        epochs=options.epochs,
        batch=options.batch,
        steps=options.steps,
        lr=options.lr,
        optimizer=options.optimizer,
        augment=options.augment,
        data=described,
        device=options.device,
    )
    return data, run


def progress(where: str, epochs: int, epoch: int, loss: float) -> None:
    """Say how far a run has come."""
    print(f"\r{where}  epoch {epoch}/{epochs}  loss {loss:.3f}   ", end="", flush=True)


def _sampler() -> str:
    blocks = torch.zeros(1, 4, 1)
    return "torch" if native.kernel_for(blocks, 2) is None else "native"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    known = sorted({*METHODS, *NEIGHBOURS, *VARIANTS})
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench accuracy", description=__doc__)
    add_options(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=known)
    options = parser.parse_args(arguments)
    options.patterns = [_pattern(pattern) for pattern in options.patterns]
    options.name = options.name or Path(options.data).name
    return options


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a bench of training runs takes."""
    parser.add_argument(
        "--data", default="digits", help="digits, shapes, or the folder of CIFAR-10"
    )
    parser.add_argument("--network", default="vgg-small", choices=sorted(NETWORKS))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "2:8", "1:8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=positive, default=12)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=4, help="simulation time steps T")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", default="adam", choices=("adam", "sgd"))
    parser.add_argument("--augment", action="store_true", help="shifts and flips")
    parser.add_argument("--train-images", type=int, help="a subset, the same for all")
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--size", type=int, default=32, help="of CIFAR-10 images; 16 or 8 averages")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="of the results; by default that of the data")
    parser.add_argument("--out", type=Path, help="folder of runs and checkpoints")
    parser.add_argument("--finished", action="store_true", help="train nothing: tell what is there")
    parser.add_argument("--results", type=Path, default=RESULTS)


def _pattern(text: str) -> str:
    """A pattern, or a budget as it is."""
    return text if " " in text else str(NM.parse(text))


def _data(options: argparse.Namespace) -> tuple[Split, dict[str, Any]]:
    if options.data == "digits":
        data, source = digits(), "scikit-learn digits"
    elif options.data == "shapes":
        asked = options.train_images or 2000, options.test_images or 1000
        data, source = moving_shapes(*asked, steps=options.steps), "moving shapes, event camera"
    else:
        data = cifar10(Path(options.data), options.train_images, options.test_images)
        data, source = shrunk(data, options.size), "CIFAR-10, JPEG copy"
    counts = {"train": len(data.train_labels), "test": len(data.test_labels)}
    return data, {"source": source, "size": data.train_images.shape[-1], **counts}


def _runs(
    base: Run, methods: Sequence[str], patterns: Sequence[str], seeds: Sequence[int]
) -> list[Run]:
    """Seed by seed, so that an interrupted bench has whole rows."""
    return [
        replace(base, method=method, pattern=pattern, seed=seed)
        for seed in seeds
        for method in methods
        for pattern in (["dense"] if method == "dense" else patterns)
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per method and pattern: accuracies of the seeds, mean and standard deviation."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["run"]["method"], row["run"]["pattern"]].append(row)
    table = []
    for (method, pattern), members in groups.items():
        values = [member["accuracy"] for member in members]
        last = [member["history"][-1]["masks"] for member in members if member["history"]]
        table.append(
            {
                "method": method,
                "pattern": pattern,
                "seeds": [member["run"]["seed"] for member in members],
                "accuracies": values,
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
                "density": members[0]["density"],
                "seconds": statistics.median(member["seconds"] for member in members),
                "masks_at_the_end": last[0] if last else [],
            }
        )
    return table


def shared(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all runs have in common."""
    own = ("method", "pattern", "seed")
    return {key: value for key, value in rows[0]["run"].items() if key not in own}


def _text(table: Sequence[Mapping[str, Any]]) -> str:
    patterns = list(dict.fromkeys(row["pattern"] for row in table))
    methods = list(dict.fromkeys(row["method"] for row in table))
    cells = {
        (row["method"], row["pattern"]): f"{row['mean']:.2%} ± {row['sd']:.2%}" for row in table
    }
    lines = ["".join([f"{'':<16}", *(f"{pattern:>18}" for pattern in patterns)])]
    for method in methods:
        found = (cells.get((method, pattern), "") for pattern in patterns)
        lines.append("".join([f"{method:<16}", *(f"{cell:>18}" for cell in found)]))
    return "\n".join(lines)


def plot(table: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Accuracy over density, one line per method, bars of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in table))
    for place, method in enumerate(methods):
        rows = sorted((r for r in table if r["method"] == method), key=lambda r: r["density"])
        aside = 1.02 ** (place - len(methods) / 2)  # so that bars stand side by side
        axis.errorbar(
            [r["density"] * aside for r in rows],
            [100 * r["mean"] for r in rows],
            yerr=[100 * r["sd"] for r in rows],
            marker="o",
            markersize=4,
            capsize=2,
            label=method,
        )
    patterns: dict[float, list[str]] = {}
    for row in table:
        names = patterns.setdefault(round(row["density"], 3), [])
        names += [] if row["pattern"] in names else [row["pattern"]]
    axis.set_xscale("log")
    axis.set_xticks(list(patterns), [f"{', '.join(n)}\n{d:.2f}" for d, n in patterns.items()])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="density of all weights", ylabel="test accuracy, %", title=title)
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
