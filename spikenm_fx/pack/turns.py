# SPDX-License-Identifier: Apache-2.0
"""Modules timed beside each other: they take turns, so that other work meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from spikenm_fx.pack.engine.meter import Meter
from spikenm_fx.state import as_given

__all__ = ["rounds", "runs_of", "spent_in", "take_turns", "typical"]

ROUNDS = 3
MOST_ROUNDS = 40
SECONDS = 0.4  # for more rounds than ROUNDS
TURN = 0.004  # seconds that a turn takes at least: small networks run several times in it
MOST_RUNS = 12


def take_turns(ways: Mapping[str, nn.Module], args: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of one forward of each module, taking turns.

    Args:
        ways: modules by name; the first says how many forwards a turn has.
        args: of each forward.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    runs = 0
    for counted in rounds():
        for way, module in ways.items():
            module(*as_given(args))
            runs = runs or runs_of(module, args)
            spent = spent_in(module, args, runs)
            if counted:
                seconds[way].append(spent)
    return {way: typical(spent) for way, spent in seconds.items()}


def rounds(least: int = ROUNDS, seconds: float = SECONDS) -> Iterator[bool]:
    """Of each round whether it counts: not the first does.

    Args:
        least: rounds that count, however long they take.
        seconds: for more of them, up to :data:`MOST_ROUNDS`.
    """
    yield False
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= least and time.perf_counter() - start > seconds:
            return
        yield True


def runs_of(module: nn.Module, args: tuple[Any, ...]) -> int:
    """How many forwards a turn has."""
    return max(1, min(MOST_RUNS, int(TURN / max(spent_in(module, args, 1), 1e-6))))


def spent_in(module: nn.Module, args: tuple[Any, ...], runs: int) -> float:
    """Seconds of one forward, of several in a row."""
    meter = Meter()

    def call() -> None:
        for _ in range(runs):
            module(*as_given(args))

    meter.measure(call)
    return meter.seconds / runs


def typical(runs: list[float]) -> float:
    """The median of the faster half: other work on the machine only ever adds time."""
    return statistics.median(sorted(runs)[: (len(runs) + 1) // 2])
