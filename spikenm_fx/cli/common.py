# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the screen, the exit codes and the options."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from spikenm_fx.errors import RecipeError

__all__ = [
    "EPILOG",
    "Checkpoint",
    "CheckpointIn",
    "Exit",
    "Force",
    "Input",
    "Json",
    "Out",
    "Pattern",
    "RootOption",
    "Screen",
    "Target",
    "refuse_existing",
    "shape_of",
]


class Exit(IntEnum):
    """Exit codes; the help text lists them."""

    OK = 0
    NO = 1
    USAGE = 2
    INPUT = 3
    INTERNAL = 4
    INTERRUPTED = 130


EPILOG = (
    "Exit codes: 0 done; 1 the answer is no (weights are not N:M, a recipe failed, kernels cannot "
    "be tried); 2 wrong usage; 3 an input cannot be used (file, recipe, model, a shape that the "
    "model does not run on, recipes none of whose code is here); 4 internal error; "
    "130 interrupted."
)

Target = Annotated[str, typer.Argument(help="A recipe file, or module:Class.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--nm",
        help="Keep at most n of m; replaces a recipe's pattern, also where its rules repeat it. "
        "'2:4' where nothing else says.",
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        help="Folder of the code, of checkouts, or where a package is installed. Recipes of "
        "repositories need it; for module:Class it is the current one by default.",
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", "-c", help="Weights: .safetensors or .pt.")
]
CheckpointIn = Annotated[
    Path, typer.Option("--checkpoint", "-c", help="Weights: .safetensors or .pt.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write; must not exist.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file that --out names.")]
Input = Annotated[
    str | None, typer.Option("--input", "-i", help="Shape of one forward's input: 4,3,32,32.")
]


@dataclass(slots=True)
class Screen:
    """Where output goes: results to standard output, all else to standard error.

    Attributes:
        as_json: results are one JSON document.
    """

    as_json: bool = False
    out: Console = field(default_factory=lambda: Console(soft_wrap=True))
    err: Console = field(default_factory=lambda: Console(stderr=True))

    def say(self, text: str) -> None:
        """Something for people; silent where JSON is asked for."""
        if not self.as_json:
            self.out.print(text, markup=False, highlight=False)

    def json(self, data: Any) -> None:
        """One JSON document."""
        typer.echo(json.dumps(data, indent=2, default=str))

    def result(self, data: Any, text: str) -> None:
        """``data`` as JSON or ``text`` for people."""
        if self.as_json:
            self.json(data)
        else:
            self.say(text)

    @contextlib.contextmanager
    def working(self, words: str) -> Iterator[None]:
        """A spinner on a terminal, as long as the body runs.

        What somebody's model prints meanwhile goes to standard error: standard output is ours.
        """
        from spikenm_fx._torch import quiet_triton

        quiet_triton()
        spinner = self.err.status(words) if self.err.is_terminal else contextlib.nullcontext()
        with spinner, contextlib.redirect_stdout(sys.stderr):
            yield


def refuse_existing(out: Path, force: bool) -> None:
    """Before any work: the file may be written.

    Raises:
        RecipeError: if it exists and ``force`` is not given, or its folder does not.
    """
    if out.exists() and not force:
        raise RecipeError(f"{out} exists; --force replaces it")
    if not out.parent.is_dir():
        raise RecipeError(f"{out.parent} is not a folder")


def shape_of(text: str | None) -> list[int] | None:
    """``"4,3,32,32"`` or ``"4x3x32x32"`` as a list; None for None.

    Raises:
        BadParameter: for nothing, which is wrong usage.
        RecipeError: for anything else that is no shape.
    """
    if text is None:
        return None
    if not text.strip():
        raise typer.BadParameter("--input is empty; give a shape, e.g. --input 4,3,32,32")
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"input shape {text!r} is not of the form 4,3,32,32")
    return [int(part) for part in parts]
