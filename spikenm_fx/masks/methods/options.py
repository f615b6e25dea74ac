# SPDX-License-Identifier: Apache-2.0
"""Options of a method as files hold them: which there are, and what is wrong with given ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spikenm_fx.errors import PlanError, did_you_mean
from spikenm_fx.masks.methods import method_class
from spikenm_fx.pattern import NM

__all__ = ["wrong_options"]


def wrong_options(
    name: str, options: Mapping[str, object], total_steps: int | None = None
) -> dict[str, str]:
    """What is wrong with plain options of a named method, by option; empty if nothing is.

    Args:
        name: of a known method.
        options: numbers, bools, strings and None, as files hold them.
        total_steps: of the run, on which the range of some depends.
    """
    cls = method_class(name)
    hints = get_type_hints(cls)
    types = {each.name: hints[each.name] for each in fields(cls)}  # type: ignore[arg-type]
    wrong = {}
    for option, value in options.items():
        if option not in types:
            hint = did_you_mean(option, types) or f"; known: {', '.join(types) or 'none'}"
            wrong[option] = f"{name} has no option {option!r}{hint}"
        elif problem := _wrong_value(value, types[option]):
            wrong[option] = problem
    if not wrong:
        try:
            cls(**options).schedule(total_steps, NM(1, 8))  # a pattern that has all of it
        except PlanError as error:
            culprit = next((each for each in options if str(error).startswith(each)), "")
            wrong[culprit] = str(error)
    return wrong


def _wrong_value(value: object, hint: Any) -> str:
    allowed = get_args(hint) or (hint,)
    if get_origin(hint) is Literal:
        words = " or ".join(map(repr, allowed))
        return "" if value in allowed else f"{value!r} is not {words}"
    plain = [each for each in allowed if each in _PLAIN]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if type(value) in plain or (type(value) is int and float in plain):
        return ""
    return f"{value!r} is not {' or '.join(_PLAIN[each] for each in plain) or 'for a file to give'}"


_PLAIN = MappingProxyType(
    {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
)
