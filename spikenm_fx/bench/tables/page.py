# SPDX-License-Identifier: Apache-2.0
"""The page of all figures, and the few that the README quotes."""

from __future__ import annotations

import json
from pathlib import Path

from spikenm_fx.bench.frontier import gain_at_a_quarter
from spikenm_fx.bench.tables import channels, learning, reading, running, speed
from spikenm_fx.bench.tables.chapter import Chapter, Result, machine_of, percent, times
from spikenm_fx.bench.tables.learning import accuracy_of
from spikenm_fx.errors import SpikeNMError

__all__ = ["BEGIN", "CHAPTERS", "END", "headlines", "page", "unread", "with_headlines"]

CHAPTERS: tuple[Chapter, ...] = (
    *learning.CHAPTERS,
    *channels.CHAPTERS,
    *speed.CHAPTERS,
    *reading.CHAPTERS,
    *running.CHAPTERS,
)
BEGIN = "<!-- figures: written by python -m spikenm_fx.bench tables -->"
END = "<!-- end of figures -->"

_HEAD = """# Figures

Written by `python -m spikenm_fx.bench tables` from the JSON files in this folder; no figure is
typed by hand. Each chapter names the command that measures it and the machine it was measured on.
Times are ratios of runs that took turns in one process. `n:m` means: keep at most n of m.
"""


def page(folder: Path) -> str:
    """The whole page.

    Args:
        folder: of the JSON files.

    Raises:
        SpikeNMError: if a file that a chapter reads is missing, or one is read by none.
    """
    lost = unread(folder)
    if lost:
        raise SpikeNMError(
            f"{', '.join(lost)} in {folder}: read by no chapter; add a Chapter to "
            "spikenm_fx/bench/tables, or delete the file"
        )
    return "\n".join([_HEAD, *filter(None, (_text(chapter, folder) for chapter in CHAPTERS))])


def unread(folder: Path) -> list[str]:
    """Names of JSON files that no chapter reads."""
    known = {f"{file}.json" for chapter in CHAPTERS for file in chapter.files + chapter.later}
    return sorted({path.name for path in folder.glob("*.json")} - known)


def _text(chapter: Chapter, folder: Path) -> str:
    there = [name for name in chapter.later if (folder / f"{name}.json").exists()]
    files = [*chapter.files, *there]
    if not files:
        return ""
    results = [_read(folder, name) for name in files]
    parts = [f"## {chapter.title}", chapter.about, chapter.body(*results)]
    sources = zip(files, map(machine_of, results), strict=True)
    parts.append("\n".join(f"- [{name}.json]({name}.json): {where}" for name, where in sources))
    parts.append(f"```\n{chapter.command}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _read(folder: Path, name: str) -> Result:
    path = folder / f"{name}.json"
    try:
        content: Result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpikeNMError(f"{path} cannot be read: {error}") from error
    return content


def headlines(folder: Path) -> str:
    """Three figures for the README: accuracy, the cost of training, the speed of packed layers."""
    ten = _read(folder, "accuracy-cifar10-10-seeds")
    hooks = _read(folder, "accuracy-cifar10-two-hooks")
    cells = [
        f"{words} {percent(row['mean'], row['sd'])}"
        for words, row in (
            ("dense", accuracy_of(ten, "dense", "dense")),
            ("2:4", accuracy_of(hooks, "spikenm", "2:4")),
            ("1:8", accuracy_of(hooks, "spikenm", "1:8")),
        )
    ]
    step = _read(folder, "step")["summary"]
    small, wide = (step[f"{network}, spikenm 2:4"]["after"] for network in ("vgg-small", "fc2048"))
    layers = _read(folder, "layers-1t")["summary"]["auto 2:4 at 15%"]
    networks = _read(folder, "network-1t")["summary"]["over_eager"]
    seeds = len(accuracy_of(hooks, "spikenm", "2:4")["accuracies"])
    gain = gain_at_a_quarter(_read(folder, "frontier-cifar10")["rows"])
    equal = ""
    if gain is not None:
        equal = (
            f" At a quarter of its bytes {100 * gain[0]:.1f} points above dense networks of as "
            "many ([plot](spikenm_fx/bench/results/frontier-cifar10.png))."
        )
    lines = [
        f"Accuracy, short CIFAR-10 runs, {seeds} seeds: {', '.join(cells)}.{equal}",
        f"A training step at 2:4 takes {times(small)} the dense one's time (small VGG, CPU), "
        f"{times(wide)} where wide fully connected layers are all there is.",
        f"Packed 2:4 layers at 15 % spikes run {times(layers['median'])} as fast as torch's best "
        f"dense path (median; least {times(layers['least'])}), whole networks {times(networks)} "
        "as fast as eager torch (one thread).",
    ]
    return "\n".join(f"- {line}" for line in lines)


def with_headlines(readme: str, folder: Path) -> str:
    """The README's text with the headlines between its two marks renewed.

    Raises:
        SpikeNMError: if the text lacks the marks.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SpikeNMError(f"the README lacks the marks {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{headlines(folder)}\n{END}{tail}"
