# SPDX-License-Identifier: Apache-2.0
"""Mask methods: one file each, one small interface, a dictionary of names.

A method sees weights as blocks ``(lead, M, inner)`` and answers three questions: which learnable
scores it needs, which mask a training step uses, and how the gradient of the masked weight splits
into gradients of the weight and of the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

from torch import Tensor

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.noise import Key
from spikenm_fx.pattern import NM

__all__ = ["METHODS", "Draw", "Method", "method_named"]


@dataclass(frozen=True, slots=True)
class Draw:
    """What one layer's mask depends on at one optimizer step, besides weight and scores.

    Attributes:
        nm: the pattern.
        key: noise key of (seed, step, layer).
        kappa: logit scale.
        tau: temperature of the straight-through draws.
        frozen: True once the schedule has frozen the masks.
        present: bool ``(lead, M, 1)`` where the last block is padded, else None.
    """

    nm: NM
    key: Key
    kappa: float
    tau: float
    frozen: bool
    present: Tensor | None


class Method(Protocol):
    """How masks come from weights and scores; instances are immutable and hold no tensor."""

    @property
    def name(self) -> str:
        """The name that :func:`spikenm_fx.sparsify` knows it by."""

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor:
        """Initial learnable scores for a blocked weight."""

    def train_mask(self, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor:
        """The bool mask of one training step; exactly N of M where N are present."""

    def final_mask(self, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor:
        """The deterministic bool mask that evaluation and ``fold`` use."""

    def score_grad(
        self, grad_mask: Tensor, weight: Tensor, scores: Tensor, draw: Draw
    ) -> Tensor | None:
        """Gradient of the scores from dL/dmask, or None where the scores rest."""


def _spikenm() -> Method:
    from spikenm_fx.masks.methods.spikenm import SpikeNM

    return SpikeNM()


METHODS: dict[str, Callable[[], Method]] = {"spikenm": _spikenm}
"""Names that ``sparsify(method=...)`` and recipes know, each with its default settings."""


def method_named(method: str | Method) -> Method:
    """The method of that name, or the given instance itself.

    Raises:
        PlanError: for an unknown name, with the nearest known one.
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"method {method!r} is unknown; known are {sorted(METHODS)}{hint}")
    return METHODS[method]()
