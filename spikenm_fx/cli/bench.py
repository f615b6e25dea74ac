# SPDX-License-Identifier: Apache-2.0
"""``spikenm-fx bench``: the project's benchmarks, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spikenm_fx.cli.common import Json, Screen

__all__ = ["bench"]


def bench(
    name: Annotated[str, typer.Argument(help="Which one; none lists them.")] = "",
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Its own options, behind --; -- --help lists them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one of the project's benchmarks; its figures are JSON where that is asked for."""
    from spikenm_fx.bench.__main__ import bench_of, benches, summary
    from spikenm_fx.errors import did_you_mean

    screen = Screen(as_json)
    if not name:
        about = {known_name: summary(module) for known_name, module in benches().items()}
        text = "\n".join(f"{known_name:<12}{words}" for known_name, words in about.items())
        screen.result({"benches": about}, text)
        return
    if bench_of(name) is None:
        known = benches()
        raise typer.BadParameter(
            f"{name!r} is no benchmark; known are {', '.join(known)}{did_you_mean(name, known)}"
        )
    code, lines = _run(name, arguments or [], screen)
    if as_json:
        screen.json({"bench": name, "exit_code": code, "output": lines, "result": _saved(lines)})
    raise typer.Exit(code)


def _run(name: str, arguments: list[str], screen: Screen) -> tuple[int, list[str]]:
    """Exit status and lines; they are shown as they come, on standard error under ``--json``."""
    words = [sys.executable, "-u", "-m", "spikenm_fx.bench", name, *arguments]
    lines = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stdout or ():
            lines.append(line.rstrip("\n"))
            typer.echo(lines[-1], err=screen.as_json)
    return process.returncode, lines


def _saved(lines: list[str]) -> Any:
    """What the benchmark wrote: it ends by saying where."""
    for line in reversed(lines):
        if line.endswith(".json") and Path(line).is_file():
            return json.loads(Path(line).read_text(encoding="utf-8"))
    return None
