# SPDX-License-Identifier: Apache-2.0
"""Chapters on learning masks: accuracy, what it costs, what the choices rest on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from spikenm_fx.bench.frontier import gain_at_a_quarter
from spikenm_fx.bench.tables.chapter import Chapter, Result, markdown, percent, times
from spikenm_fx.pattern import NM

__all__ = ["CHAPTERS", "accuracy_of"]

NAMES = {
    "spikenm-no-eid": "spikenm without distillation",
    "magnitude": "magnitude (dense for half of the run)",
    "activity-still": "activity, without growth (no norms)",
    "activity-weighted": "activity times weight magnitude",
    "cyclical-rate": "cyclical, learning rate of each cycle",
    "spikenm-marginals": "spikenm, gradient through exact marginals",
    "spikenm-signal": "spikenm, credit: weight magnitude, eligibility and learning signal",
    "uticket": "uticket (dense for half of the run, then rewound)",
    "srste-fade": "srste with the fade of spikenm",
    "spikenm-strict": "spikenm, N:M from the first step (`fade=0.0`)",
    "spikenm-eligibility": "spikenm, credit: eligibility",
    "spikenm-weight": "spikenm, credit: weight magnitude",
    "spikenm-rate": "spikenm, credit: weight magnitude times the root of the rate",
}
"""What the methods and their variants are called on the page."""


def accuracy_of(result: Result, method: str, pattern: str) -> dict[str, Any]:
    """The row of a method and pattern: accuracies of its seeds, mean, standard deviation."""
    return next(
        row for row in result["rows"] if (row["method"], row["pattern"]) == (method, pattern)
    )


def _accuracy(result: Result) -> str:
    """Settings, mean and standard deviation by method and pattern, and who leads, by seed."""
    rows = {(row["method"], row["pattern"]): row for row in result["rows"]}
    patterns = sorted({p for _, p in rows} - {"dense"}, key=lambda p: (-NM.parse(p).density, p))
    about = _settings(result)
    if ("dense", "dense") in rows:
        about += f" Dense network: {_cell(rows['dense', 'dense'])}."
    methods = [m for m in dict.fromkeys(m for m, _ in rows) if m != "dense"]
    lines = [
        [NAMES.get(method, method), *(_cell(rows.get((method, p))) for p in patterns)]
        for method in methods
    ]
    return "\n\n".join([about, markdown(["method", *patterns], lines), *_leads(rows, patterns)])


def _cell(row: Any) -> str:
    if row is None:
        return ""
    return percent(row["mean"], row["sd"] if len(row["accuracies"]) > 1 else None)


def _settings(result: Result) -> str:
    run, data = result["settings"], result["settings"]["data"]
    counts = sorted({len(row["accuracies"]) for row in result["rows"]})
    seeds = f"mean and standard deviation of {', '.join(map(str, counts))} seeds"
    seeds = seeds if counts[-1] > 1 else "one seed"
    return (
        f"{data['source']}, {data['size']} x {data['size']} pixels, {data['train']:,} training and "
        f"{data['test']:,} test images; {run['network'].partition('-x')[0]}, T={run['steps']}, "
        f"{run['epochs']} epochs, batch {run['batch']}, {run['optimizer']} at {run['lr']:g}; "
        f"{seeds}, the same for all methods."
    )


def _leads(rows: dict[tuple[str, str], Any], patterns: list[str]) -> list[str]:
    """By how many points spikenm is ahead of each other method, seed by seed."""
    others = [m for m in dict.fromkeys(m for m, _ in rows) if m not in ("dense", "spikenm")]
    if not others or any(("spikenm", pattern) not in rows for pattern in patterns):
        return []
    table = []
    for method in others:
        cells = [_lead(rows["spikenm", p], rows.get((method, p))) for p in patterns]
        table.append([NAMES.get(method, method), *cells])
    words = "Points by which spikenm is ahead, pairs of equal seeds, with the standard error:"
    return [words, markdown(["over", *patterns], table)]


def _lead(row: Any, other: Any) -> str:
    """Points by which a row is ahead, over the seeds that both have, with the standard error."""
    if other is None:
        return ""
    ours, theirs = _by_seed(row), _by_seed(other)
    differences = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
    if not differences:
        return ""
    mean = f"{round(statistics.mean(differences), 1) + 0.0:+.1f}"  # no "-0.0"
    if len(differences) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.1f}"


def _by_seed(row: Any) -> dict[int, float]:
    """Accuracies by seed; a file that names none counts from 0."""
    seeds = row.get("seeds", range(len(row["accuracies"])))
    return dict(zip(seeds, row["accuracies"], strict=True))


def _neighbours(result: Result, known: Result) -> str:
    """Methods by pattern, and how they stand to spikenm of another file on equal seeds."""
    rows = {(row["method"], row["pattern"]): row for row in result["rows"]}
    others = {(row["method"], row["pattern"]): row for row in known["rows"]}
    patterns = sorted({p for _, p in rows} - {"dense"}, key=lambda p: (-NM.parse(p).density, p))
    lines = []
    for method in dict.fromkeys(method for method, _ in rows):
        cells = []
        for pattern in patterns:
            row = rows.get((method, pattern))
            ours = others.get(("spikenm", pattern))
            counted = "" if row is None else f" ({len(row['accuracies'])})"
            cells.append(_cell(row) + counted)
            cells.append("" if row is None or ours is None else _lead(row, ours))
        lines.append([NAMES.get(method, method), *cells])
    head = ["method"]
    for pattern in patterns:
        head += [f"{pattern} (seeds)", "ahead of spikenm, equal seeds"]
    return _settings(result) + "\n\n" + markdown(head, lines)


def _frontier(result: Result) -> str:
    """Dense widths and sparse patterns by bytes; what the sparse ones gain at a quarter of them."""
    rows = [
        [
            *(f"{row['width']:g}", row["pattern"]),
            percent(row["mean"]) + f" ({len(row['accuracies'])})",
            *(f"{row[key]:,.0f}" for key in ("packed_bytes", "synops")),
        ]
        for row in sorted(result["rows"], key=lambda row: row["packed_bytes"])
    ]
    head = ["width", "pattern", "accuracy (seeds)", "bytes, packed", "operations a sample"]
    gain = gain_at_a_quarter(result["rows"])
    words = ""
    if gain is not None:
        lead, pattern, width = gain
        words = (
            f"At about a quarter of the bytes of width 1 the best sparse network ({pattern}, width "
            f"{width:g}) is {100 * lead:+.1f} points from the line through the dense ones, taken "
            "to be level below the smallest of them."
        )
    return "\n\n".join(part for part in (_settings(result), words, markdown(head, rows)) if part)


def _planning(result: Result) -> str:
    return (
        f"A spiking transformer of {result['parameters'] / 1e6:.0f} million parameters: `plan` "
        f"{result['plan']:.2f} s, `sparsify` {result['sparsify']:.2f} s."
    )


def _sampler(result: Result) -> str:
    rows = [
        (row["pattern"], _ms(row["naive"]), _ms(row["ours"]), times(row["ratio"], 1))
        for row in result["rows"]
    ]
    head = ["pattern", "plain loop", "here", "faster by"]
    return f"{result['weights'] / 1e6:.1f} million weights.\n\n" + markdown(head, rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _step(result: Result) -> str:
    run = result["settings"]
    about = (
        f"Batch {run['batch']}, T={run['steps']}, credits refreshed every {run['refresh_every']} "
        f"steps; median of {run['repeats']}."
    )
    rows = (
        (
            *(row["network"], row["method"], row["nm"]),
            f"{row['after']['dense_milliseconds']:.1f} ms",
            *(_over(row.get(version), "a run's mean") for version in ("before", "after")),
            _over(row["after"], "refreshing"),
        )
        for row in result["rows"]
    )
    head = ["network", "method", "pattern", "dense", "earlier version", "now", "refreshing step"]
    return about + "\n\n" + markdown(head, rows)


def _over(version: Any, kind: str) -> str:
    """How many times the dense step's time; nothing for what was not measured."""
    ratios = {} if version is None else version["over_dense"]
    return times(ratios[kind]) if kind in ratios else ""


def _footprint(result: Result) -> str:
    """Memory, launches, waits and graphs: of the earlier version, if it was measured, and now."""
    run = result["settings"]
    versions = [name for name in ("before", "after") if name in run["versions"]]
    rows = [
        ["" if number else row["key"], what, *(show(row[version]) for version in versions)]
        for row in result["rows"]
        for number, (what, show) in enumerate(_SHOWN[row["key"].split(",")[0]].items())
    ]
    names = {"before": "earlier version", "after": "now"}
    about = f"Width {run['width']}; {run['layers']} masked layers, counted beyond the dense ones."
    return about + "\n\n" + markdown(["", "", *(names[v] for v in versions)], rows)


def _whole(graph: Any) -> str:
    """Graph breaks and recompilations; ``fullgraph=True`` stops at the first break."""
    if graph["breaks"] < 0:
        return "does not compile whole"
    return f"{graph['breaks']} breaks, {graph['recompilations']} recompilations"


_SHOWN: Mapping[str, Mapping[str, Callable[[Any], str]]] = {
    "memory": {
        "weights, gradients, optimizer and masks, over the weights": lambda v: (
            f"{v['weights']:.2f}"
        ),
        "kept of activations": lambda v: f"{v['activations_kept_bytes'] / 2**20:.1f} MiB",
    },
    "launches": {
        "forward and backward": lambda v: str(v["launches"]["passes"]),
        "optimizer step": lambda v: str(v["launches"]["step"]),
        "evaluation": lambda v: str(v["launches"]["evaluation"]),
        "host syncs of all three": lambda v: str(sum(v["syncs"].values())),
    },
    "graphs": {
        "training": lambda v: _whole(v["train"]),
        "evaluation": lambda v: _whole(v["eval"]),
    },
}


def _variance(result: Result) -> str:
    rows = [
        [row["step"], *(f"{row[key]:.3f}" for key in ("median_ratio", "median_ratio_marginals"))]
        for row in result["rows"]
    ]
    about = f"{result['settings']['pattern']}, {result['settings']['draws']} draws."
    head = ["optimizer step", "draws with distillation", "exact marginals"]
    words = "Noise to signal over that of the draws alone, same masks; median of the layers:"
    return about + " " + words + "\n\n" + markdown(head, rows)


_RUN = (
    "python -m spikenm_fx.bench accuracy --data DIR --size 16 --network vgg-tiny --steps 2 "
    "--epochs 6 --batch 50 --lr 0.005 --train-images 10000 --test-images 5000 --threads 1"
)
_LONG = _RUN.replace("--epochs 6", "--epochs 18")
_SHAPES = (
    "python -m spikenm_fx.bench accuracy --data shapes --steps 20 --epochs 6 --batch 50 --lr 0.002 "
    "--train-images 1000 --test-images 1000 --threads 1 --patterns 1:8 --seeds 0 1 2 3 4"
)
_TEN = "--patterns 2:4 1:8 --seeds 0 1 2 3 4 5 6 7 8 9"


CHAPTERS = (
    Chapter(
        "Accuracy of short runs",
        ("accuracy-cifar10",),
        f"{_RUN} --seeds 0 1 2 3 4",
        _accuracy,
        "All figures are ours and no paper's. [Plot](accuracy-cifar10.png).",
    ),
    Chapter(
        "Accuracy over ten seeds",
        ("accuracy-cifar10-10-seeds",),
        f"{_RUN} {_TEN} --name cifar10-10-seeds",
        _accuracy,
        "At 2:4 spikenm, srste and magnitude cannot be told apart, nor can spikenm with and "
        "without distillation. At 1:8 spikenm is ahead; most of the lead over srste is the "
        "fade's, and SR-STE gains by it as well.",
    ),
    Chapter(
        "The same ten seeds where logits move by a rule of their own",
        ("accuracy-cifar10-two-hooks",),
        f"{_RUN} --methods spikenm --patterns 1:8 2:4 {_TEN.split(' 1:8 ')[1]} "
        "--name cifar10-two-hooks",
        _accuracy,
        "What this version does; in the table before this one the user's optimizer moved the "
        "logits, on another processor.",
    ),
    Chapter(
        "Accuracy of neighbouring methods",
        ("accuracy-cifar10-neighbours", "accuracy-cifar10-two-hooks"),
        f"{_RUN} --methods cyclical spikenm-marginals magnitude srste uticket regrow activity "
        "--patterns 2:4 1:8 --seeds 0 1 2 3 4 --name cifar10-neighbours",
        _neighbours,
        "The three best in the mean of both patterns over ten seeds, the rest over five. At "
        "2:4 cyclical and spikenm cannot be told apart, with draws or with exact marginals. "
        "Credits with the learning signal were no gain over the default's: their code is not here "
        "any more. Exact marginals are an option that gains nothing either, with less noise in "
        "the logits.",
    ),
    *(
        Chapter(
            f"Accuracy on event frames, {words}",
            (f"accuracy-shapes-{network}",),
            f"{_SHAPES} --network events-{network} --methods dense spikenm srste cyclical regrow "
            f"uticket magnitude spikenm-marginals --name shapes-{network}",
            _accuracy,
            "A square or a ring moves past an event camera; made by a script with a fixed seed.",
        )
        for network, words in (("feedforward", "feed-forward"), ("recurrent", "recurrent"))
    ),
    Chapter(
        "Accuracy at equal bytes",
        ("frontier-cifar10",),
        f"{_RUN.replace('accuracy', 'frontier')} --sparse-widths 1 --seeds 0 1 2 --name cifar10",
        _frontier,
        "The budget plan mixes patterns by the credits of one epoch. [Plot](frontier-cifar10.png).",
    ),
    Chapter(
        "Accuracy after three times the epochs",
        ("accuracy-cifar10-18-epochs",),
        f"{_LONG} --patterns 2:4 1:8 --seeds 0 1 2 --name cifar10-18-epochs",
        _accuracy,
        "By an earlier version, in which the user's optimizer moved the logits.",
    ),
    Chapter(
        "The best methods after three times the epochs",
        ("accuracy-cifar10-18-epochs-best",),
        f"{_LONG} --methods dense spikenm cyclical spikenm-marginals --patterns 2:4 1:8 "
        "--seeds 0 1 2 --name cifar10-18-epochs-best",
        _accuracy,
        "What this version does.",
    ),
    Chapter(
        "A fade at 2:4",
        ("accuracy-cifar10-fade-2of4",),
        f"{_RUN} --methods spikenm {_TEN.replace(' 1:8', '')} --name cifar10-fade-2of4",
        _accuracy,
        "Measured while spikenm faded at every sparsity. Where half is kept a fade gains nothing "
        "over the ten seeds above; hence there is none now.",
    ),
    Chapter(
        "N:M from the first step",
        ("accuracy-cifar10-strict",),
        f"{_RUN} --methods spikenm-strict --patterns 1:8 --seeds 0 1 2 3 4 --name cifar10-strict",
        _accuracy,
    ),
    Chapter(
        "Credits of the distillation",
        ("accuracy-cifar10-credits",),
        f"{_RUN} --methods spikenm spikenm-eligibility spikenm-weight spikenm-rate --patterns 1:8 "
        "--seeds 0 1 2 3 4 --name cifar10-credits",
        _accuracy,
        "By default the credit is weight magnitude times eligibility. Chosen on held-out training "
        "images at 1:8: a prior that moves with the weights, rather than logits alone; the fade "
        "over 60 % of the steps before the freeze, rather than 40, 80 or 100 %; kappa from 1 to 5, "
        "rather than to 2, 10 or 15; the weight 0.1 of the distillation. What did not help: "
        "stronger distillation (weights 0.3 and 1 are clearly worse), sharper targets, a longer "
        "freeze, no decay of undrawn weights, a gradient of the logits that grows as the fade "
        "goes, weights scaled up before the fade.",
    ),
    Chapter(
        "Noise of the logits' gradient",
        ("variance",),
        "python -m spikenm_fx.bench variance",
        _variance,
        "Distillation does not reduce the variance of the logits' gradient over mask draws. Exact "
        'marginals (`SpikeNM(gradient="marginals")`) do, less so as the logits settle; the noise '
        "that is left is that of the loss under the masks that were drawn.",
    ),
    Chapter(
        "Cost of a training step",
        ("step",),
        "python -m spikenm_fx.bench step --before DIR",
        _step,
        "A whole step (forward, backward, Adam) over the dense step of the same network; the "
        "mean of a run, credits refreshed as often as they are.",
    ),
    Chapter(
        "Memory, launches and graphs of training",
        ("footprint",),
        "python -m spikenm_fx.bench footprint --before DIR",
        _footprint,
        "With Adam. Launches are ATen operations on the path without compiled kernels, which is "
        "the one that a GPU takes. A hundred training steps, the freeze among them, are compiled.",
    ),
    Chapter(
        "Mask sampling",
        ("sampler",),
        "python -m spikenm_fx.bench sampler",
        _sampler,
        "Forward and backward, over the plain loop of masked argmax, softmax and scatter.",
    ),
    Chapter(
        "Planning",
        ("planning",),
        "python -m spikenm_fx.bench planning",
        _planning,
    ),
)
