# SPDX-License-Identifier: Apache-2.0
"""Chapters on what runs need beside time: memory of verbs and long runs, and what kills leave."""

from __future__ import annotations

from spikenm_fx.bench.tables.chapter import Chapter, Result, markdown

__all__ = ["CHAPTERS"]


def _peak(result: Result) -> str:
    """Weights at the peak of each verb, and what is alive in a long run."""
    run = result["settings"]
    verbs = markdown(
        ["verb", *(f"{way}, {run[way]} x {run[way]}" for way in ("resident", "counted"))],
        [
            [verb, *(f"{result[way][verb]:.2f} W" for way in ("resident", "counted"))]
            for verb in result["resident"]
        ],
    )
    long = markdown(
        ["after steps", "bytes alive", "storages alive"],
        [
            [steps, f"{found['bytes']:,}", found["storages"]]
            for steps, found in result["alive"].items()
        ],
    )
    return f"{verbs}\n\n{long}"


def _faults(result: Result) -> str:
    run, kills = result["settings"], result["kills"]
    about = f"{run['ranks']} ranks, {run['steps']} steps, a checkpoint every {run['every']} steps."
    rows = [
        ["kills of one rank", kills["one"]],
        ["kills of all ranks", kills["all"]],
        ["kills that left a half checkpoint aside", kills["half"]],
        ["runs that came to their end", kills["runs"]],
        ["of them with another state than the unbroken run", kills["other"]],
        ["longest time that a rank outlived another, seconds", kills["longest_wait"]],
        *(
            [f"{how} disk of one rank: all ranks told, older checkpoint readable",
             "yes" if found["sound"] else "no"]
            for how, found in result["refusals"].items()
        ),
    ]  # fmt: skip
    return f"{about}\n\n{markdown(['', ''], rows)}"


CHAPTERS = (
    Chapter(
        "Peak memory and long runs",
        (),
        "python -m spikenm_fx.bench peak",
        _peak,
        "One square linear layer at 2:4 and a batch of 32, SGD; W is its fp32 weight, and what was "
        "there when a verb began does not count. Resident: the system's high-water mark, in a "
        "process of its own. Counted: all tensors of torch and NumPy, allocation by allocation. "
        "Training makes gradient and momentum, 2 W, within its figure. The long run has credits "
        "refreshed every fifth step, and evaluations.",
        later=("peak",),
    ),
    Chapter(
        "Kills and disks that refuse",
        (),
        "python -m spikenm_fx.bench faults --out spikenm_fx/bench/results",
        _faults,
        "Data parallel ranks with credits, Adam, SIGKILL at random moments; each run goes on from "
        "its last checkpoint, and states are compared bit by bit.",
        later=("faults",),
    ),
)
