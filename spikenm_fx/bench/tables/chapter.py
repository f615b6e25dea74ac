# SPDX-License-Identifier: Apache-2.0
"""A chapter of the page of figures, and the Markdown that chapters are made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Chapter",
    "Result",
    "columns",
    "geometric",
    "machine_of",
    "markdown",
    "percent",
    "spread",
    "times",
]

Result = Mapping[str, Any]
"""What a benchmark has saved: a JSON file of ``bench/results``, read."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One heading of the page.

    Attributes:
        title: the heading.
        files: names of the JSON files, without their suffix.
        command: what makes them.
        body: gets the files' contents, one argument each, and returns Markdown.
        about: what was measured, and what to conclude, without figures.
        later: files that are shown as well once they are there.
    """

    title: str
    files: tuple[str, ...]
    command: str
    body: Callable[..., str]
    about: str = ""
    later: tuple[str, ...] = ()


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def columns(**formats: str) -> Callable[[Result], str]:
    """A body for a file with plain ``rows``: one table column per keyword.

    Args:
        **formats: key of the rows (underscores also stand for spaces in the heading) and the
            format specification of its values, as in ``columns(pattern="", ratio=".1f")``.
    """

    def body(result: Result) -> str:
        rows = result["rows"]
        if isinstance(rows, Mapping):  # rows by name
            rows = [{"name": name, **row} for name, row in rows.items()]
        cells = ([format(row[key], how) for key, how in formats.items()] for row in rows)
        return markdown([key.replace("_", " ") for key in formats], cells)

    return body


def machine_of(result: Result) -> str:
    """Processor, threads and versions of a measurement, as one sentence."""
    about = result.get("machine")
    if about is None:
        return f"torch {result['torch']}." if "torch" in result else "Machine not recorded."
    threads = f"{about['threads']} thread" + "s" * (about["threads"] != 1)
    place = f"{about['cpu']}, {about['isa']}, {threads}"
    if "gpu" in about:
        place = f"{about['gpu']}, {place}"
    clock = f" Clock: {result['clock']}." if "clock" in result else ""
    return f"{place}, torch {about['torch']}, Python {about['python']}.{clock}"


def percent(mean: float, sd: float | None = None, digits: int = 1) -> str:
    """``47.8 ± 0.4 %`` of shares."""
    deviation = "" if sd is None else f" ± {100 * sd:.{digits}f}"
    return f"{100 * mean:.{digits}f}{deviation} %"


def times(ratio: float, digits: int = 2) -> str:
    """A ratio as ``4.18x``."""
    return f"{ratio:.{digits}f}x"


def spread(group: Mapping[str, float]) -> str:
    """Median and least of a group of ratios."""
    return f"{times(group['median'])} / {times(group['least'])}"


def geometric(ratios: Iterable[float]) -> float:
    """Geometric mean of positive ratios."""
    return statistics.geometric_mean(ratios)
