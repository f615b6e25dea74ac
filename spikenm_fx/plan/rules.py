# SPDX-License-Identifier: Apache-2.0
"""Rules: what matches is kept apart from what is done."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from spikenm_fx.errors import PlanError, near_misses, some_of
from spikenm_fx.pattern import NM, PatternLike, Remainder

__all__ = ["Action", "Rule", "ordered_rules", "unmatched"]

Action = Literal["sparsify", "keep_dense", "ignore"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which layers, and what to do with them.

    Attributes:
        match: a qualified name of a layer or raw parameter (``"features.0"``), a class by name,
            bases included (``"class:Conv2d"``; raw parameters are of class ``Parameter``), or a
            regular expression that must match the whole qualified name (``"re:.*attn[.]q_conv"``).
        nm: pattern for these layers; None for the plan's own.
        action: ``"sparsify"``, ``"keep_dense"``, or ``"ignore"``, which wins over all other rules.
        remainder: policy where the pattern does not divide the channels; None for the plan's own.
        reason: why, for the plan's listing.

    Raises:
        PlanError: for an unknown action, policy or a regular expression that does not compile.
        PatternError: for a malformed pattern.
    """

    match: str
    nm: PatternLike | None = None
    action: Action = "sparsify"
    remainder: Remainder | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise PlanError(f"rule match {self.match!r}: give a name, 'class:Name' or 're:regex'")
        if self.action not in get_args(Action):
            raise PlanError(
                f"rule {self.match!r}: action {self.action!r} is not {get_args(Action)}"
            )
        if self.remainder is not None and self.remainder not in get_args(Remainder):
            raise PlanError(
                f"rule {self.match!r}: remainder {self.remainder!r} is not {get_args(Remainder)}"
            )
        if self.nm is not None:
            object.__setattr__(self, "nm", NM.parse(self.nm))
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise PlanError(
                    f"rule {self.match!r}: not a regular expression: {error}"
                ) from error

    @property
    def pattern(self) -> NM | None:
        """The attribute ``nm``, parsed; None where the rule leaves it open."""
        return None if self.nm is None else NM.parse(self.nm)

    def matches(self, name: str, subject: object) -> bool:
        """Whether ``subject``, the layer or raw parameter of this qualified name, is meant."""
        if self.match.startswith("class:"):
            wanted = self.match[len("class:") :]
            return any(
                wanted in (c.__name__, f"{c.__module__}.{c.__qualname__}")
                for c in type(subject).__mro__
            )
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return name == self.match


def ordered_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules as given.

    Raises:
        PlanError: if they are no list of rules.
    """
    listed = tuple(rules) if isinstance(rules, Iterable) else (rules,)
    if isinstance(rules, Rule) or not all(isinstance(rule, Rule) for rule in listed):
        raise PlanError(f"rules={rules!r}: give a list of rules, e.g. [Rule('fc1', nm='1:8')]")
    return listed


def unmatched(rule: Rule, layers: Mapping[str, object]) -> PlanError:
    """The error for a rule in vain, with what it was probably meant to match."""
    if rule.match.startswith("class:"):
        known = sorted({c.__name__ for m in layers.values() for c in type(m).__mro__[:-2]})
        near = near_misses(rule.match[len("class:") :], known, count=3, cutoff=0.4)
    else:
        known = list(layers)
        near = near_misses(rule.match.removeprefix("re:"), known, count=3, cutoff=0.4)
    shown = near or some_of(known) or "none"
    return PlanError(
        f"rule {rule.match!r} matches none of the {len(layers)} weight layers; "
        f"{'near misses' if near else 'there are e.g.'}: {shown}"
    )
