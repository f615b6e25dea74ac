# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a file that people wrote: each mistake with its place, value and way out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spikenm_fx.errors import did_you_mean

__all__ = ["Mistake", "Path", "explain", "format_path", "listing"]

Path = tuple[str | int, ...]
"""Where in a file: keys and list positions from the top."""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing wrong in a file.

    Attributes:
        path: where in the file, e.g. ``("rules", 2, "match")``; empty for the whole file.
        message: what was seen, the rule, the way out.
        line: 1-based line, or None where it has none.
    """

    path: Path
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = format_path(self.path)
        line = f"line {self.line}" if self.line is not None else ""
        place = ", ".join(part for part in (line, where) if part)
        return f"{place}: {self.message}" if place else self.message


def format_path(path: Path) -> str:
    """``("rules", 2, "match")`` as ``rules[2].match``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def listing(source: str, mistakes: Iterable[Mistake]) -> str:
    """The message of one file: how many mistakes, then each on a line of its own."""
    ordered = sorted(mistakes, key=lambda mistake: (mistake.line or 0, str(mistake.path)))
    head = f"{source}: {len(ordered)} mistake{'s' if len(ordered) > 1 else ''}"
    return "\n".join([head, *(f"  {mistake}" for mistake in ordered)])


def explain(
    error: ValidationError, model: type[BaseModel], lines: Mapping[Path, int]
) -> list[Mistake]:
    """Pydantic's findings in the words of the file's author.

    Args:
        error: what pydantic raised.
        model: the class that was validated, for near misses among its keys.
        lines: line of each path of the file.
    """
    return [_one(detail, model, lines) for detail in error.errors(include_url=False)]


def _one(detail: ErrorDetails, model: type[BaseModel], lines: Mapping[Path, int]) -> Mistake:
    path = tuple(detail["loc"])
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), None)
    value = detail["input"]
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    match detail["type"]:
        case "extra_forbidden":
            return Mistake(path, _unknown_key(path, model), line)
        case "missing":
            return Mistake(path, "is required and missing", line)
        case "literal_error":
            choices = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
            near = did_you_mean(str(value), choices)
            return Mistake(path, f"{shown} is not one of {', '.join(choices) or '1'}{near}", line)
        case "string_type" if isinstance(value, bool | int | float):
            return Mistake(path, f"{shown} must be text: quote it", line)
        case "value_error":
            return Mistake(path, str(detail["msg"]).removeprefix("Value error, "), line)
        case "string_pattern_mismatch":
            rule = detail.get("ctx", {}).get("pattern")
            return Mistake(path, f"{shown} does not fit {rule}", line)
        case _:
            return Mistake(path, f"{shown}: {detail['msg']}", line)


def _unknown_key(path: Path, model: type[BaseModel]) -> str:
    keys = list(_model_at(path[:-1], model).model_fields)
    near = did_you_mean(str(path[-1]), keys)
    return f"unknown key {path[-1]!r}{near or '; known here: ' + ', '.join(keys)}"


def _model_at(path: Path, model: type[BaseModel]) -> type[BaseModel]:
    """The schema's class that validates what is at ``path``."""
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = _inner_model(model.model_fields[part].annotation) or model
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_inner_model, get_args(annotation))), None)
