# SPDX-License-Identifier: Apache-2.0
"""Chapters on channels: permuted for N:M, with and without a fine-tune, and removed."""

from __future__ import annotations

from typing import Any

from spikenm_fx.bench.tables.chapter import Chapter, Result, markdown, percent

__all__ = ["CHAPTERS"]

_ORDERS = {"none": "as trained", "magnitude": "permuted, magnitude", "rate": "permuted, rate"}


def _permuted(result: Result) -> str:
    """Efficacy on random matrices, and what N:M keeps in models before and after."""
    matrices = (
        (
            *(row["nm"], row["search"], percent(row["efficacy"]), percent(row["least"])),
            f"{1e3 * row['seconds']:.0f} ms",
        )
        for row in result["matrices"]
    )
    models = (
        (
            *(row["model"], row["nm"], percent(row["kept_before"]), percent(row["kept_after"])),
            *(f"{row['groups_moved']} of {row['groups']}", f"{row['difference']:.1e}"),
        )
        for row in result["models"]
    )
    head = ["model", "pattern", "kept before", "kept after", "groups moved", "outputs differ by"]
    return "\n\n".join(
        [
            markdown(["pattern", "search", "efficacy", "least", "processor time"], matrices),
            markdown(head, models),
        ]
    )


def _trained_models(result: Result) -> str:
    """What N:M keeps of trained models before and after."""
    rows = (
        (
            *(row["model"], percent(row["accuracy"]), row["nm"]),
            *(percent(row["kept_before"], digits=2), percent(row["kept_after"], digits=2)),
            f"{row['groups_moved']} of {row['groups']}",
        )
        for row in result["rows"]
    )
    run = result["settings"]
    about = (
        f"{run['epochs']} epochs of {run['train_images']:,} CIFAR-10 images, {run['size']} x "
        f"{run['size']} pixels, T={run['steps']}; accuracy on {run['test_images']:,} test images."
    )
    head = ["model", "accuracy", "pattern", "kept before", "kept after", "groups moved"]
    return f"{about}\n\n{markdown(head, rows)}"


def _oneshot(result: Result) -> str:
    """Accuracy by pattern and order, and points over the order as trained, seed by seed."""
    dense = {row["seed"]: row["dense"] for row in result["rows"]}
    mean = sum(dense.values()) / len(dense)
    rows = [
        (
            *(row["nm"], _ORDERS[row["permuted"]], percent(row["kept_more"], digits=2)),
            *(cell for key in ("one_shot", "tuned") for cell in _gained(row, key, len(dense))),
        )
        for row in result["summary"]
    ]
    tuned = f"after {result['settings']['tune_steps']} steps"
    head = ["pattern", "channels", "kept more", "in one shot", "gained", tuned, "gained"]
    about = f"{_trained(result, len(dense))} Dense networks: {percent(mean)}."
    return f"{about}\n\n{markdown(head, rows)}"


def _gained(row: dict[str, Any], key: str, seeds: int) -> tuple[str, str]:
    """Accuracy with its deviation, and the mean gain with its standard error."""
    gain, sd = row[f"{key}_over_none"]
    words = "" if row["permuted"] == "none" else f"{100 * gain:+.1f} ± {100 * sd / seeds**0.5:.1f}"
    return percent(*row[key]), words


def _trained(result: Result, seeds: int) -> str:
    run = result["settings"]
    return (
        f"CIFAR-10, {run['size']} x {run['size']} pixels, {run['train_images']:,} training and "
        f"{run['test_images']:,} test images; {run['network']}, T={run['steps']}, "
        f"{run['epochs']} epochs; {seeds} seeds."
    )


def _removed(result: Result) -> str:
    """What each removal took out and saved."""
    rows = [
        (
            *(
                row["seed"],
                "silent on 1,000 images, too" if row["silent"] else "never able to spike",
            ),
            *(row["removed"], _change(row["parameters"], ",d"), _change(row["bytes"], ",d")),
            " -> ".join(map(percent, row["accuracy"])),
            _change((row["ms"]["before"], row["ms"]["after"]), ".1f"),
            _change((row["ms"]["before, packed"], row["ms"]["after, packed"]), ".1f"),
        )
        for row in result["rows"]
    ]
    head = ["seed", "dead are", "channels removed", "parameters", "bytes", "accuracy"]
    seeds = len({row["seed"] for row in result["rows"]})
    about = f"Trained at {result['settings']['pattern']}. {_trained(result, seeds)}"
    return f"{about}\n\n{markdown([*head, 'ms', 'packed, ms'], rows)}"


def _change(pair: Any, how: str) -> str:
    return " -> ".join(format(value, how) for value in pair)


_SHORT = "--data DIR --epochs 4 --train-images 8000 --test-images 2000"

CHAPTERS = (
    Chapter(
        "Permuted channels",
        ("permute",),
        "python -m spikenm_fx.bench permute --json spikenm_fx/bench/results/permute.json",
        _permuted,
        "Efficacy: which share of the magnitude that a pattern loses against unstructured pruning "
        "of the same size is kept by another order of the channels; random 64 x 128 matrices. Of "
        "models, with their random weights: the share of the magnitude that stays where weights "
        "become N:M, how many groups of channels move, and by how much the "
        "outputs then differ in float64 (0 "
        "where weights, float32 at first, are summed over spikes: such sums are exact).",
    ),
    Chapter(
        "Permuted channels of trained models",
        ("permute-trained",),
        "python -m spikenm_fx.bench permute trained --data DIR --size 32 --epochs 1 "
        "--train-images 1000 --test-images 500 --batch 25",
        _trained_models,
        "Models of SpikingJelly, trained dense for a moment. Kept: the share of the magnitude that "
        "stays where weights become N:M.",
    ),
    Chapter(
        "Permuted channels, accuracy",
        ("oneshot-cifar10",),
        f"python -m spikenm_fx.bench oneshot {_SHORT}",
        _oneshot,
        "Trained dense, made N:M by magnitude in one shot, then trained on for a moment. Gains "
        "are in points over the channels as trained, with their standard error, pairs of equal "
        "seeds: they are there at 1:4 before the fine-tune; at 2:4 and after it there are none "
        "that can be told from chance.",
    ),
    Chapter(
        "Removed channels",
        ("removal-cifar10",),
        f"python -m spikenm_fx.bench removal {_SHORT}",
        _removed,
        "No neuron here can be proved never to spike; those that stay silent on data are few, and "
        "leave accuracy as it is. Milliseconds of CPU time of one batch on one thread, variants "
        "in turn.",
    ),
)
