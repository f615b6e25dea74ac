# SPDX-License-Identifier: Apache-2.0
"""Mask methods: one file each, one small interface, a dictionary of names.

A method sees weights as blocks ``(lead, M, inner)``, of one layer or of many, and answers three
questions: which scores it needs, which mask a training step uses, and what gradient the scores get
from that of the masked weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError, did_you_mean
from spikenm_fx.masks import native
from spikenm_fx.masks.noise import Key
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.native.library import kernels
from spikenm_fx.pattern import NM, BlockView

__all__ = ["METHODS", "Draw", "Method", "kept", "method_class", "method_named"]


@dataclass(frozen=True, slots=True)
class Draw:
    """What masks depend on besides weight and scores, for the blocks of one layer or of many.

    Numbers that differ from layer to layer may be tensors with one value a row, ``(lead, 1, 1)``.

    Attributes:
        nm: the pattern.
        kappa: logit scale.
        tau: temperature of the straight-through draws.
        prior: what a weight of twice its block's mean magnitude gains over one of mean magnitude.
        key: noise key of (seed, step, layer).
        noise: instead of a key, Gumbel noise of the shape of the scores.
        present: bool ``(lead, M, 1)`` where the last block is padded, else None.
        step: the optimizer step; None for the final masks.
        total_steps: of the whole run, where it is known.
        view: how the weight is cut into blocks; None for the blocks of many.
        credit: what a method that is ``guided`` goes by, in blocks; None before it is known.
    """

    nm: NM
    kappa: float | Tensor = 1.0
    tau: float = 1.0
    prior: float | Tensor = 0.0
    key: Key | None = None
    noise: Tensor | None = None
    present: Tensor | None = None
    step: int | None = None
    total_steps: int | None = None
    view: BlockView | None = None
    credit: Tensor | None = None


class Method(Protocol):
    """How masks come from weights and scores; instances are immutable and hold no tensor."""

    @property
    def name(self) -> str:
        """The name that :func:`spikenm_fx.sparsify` knows it by."""

    @property
    def learns(self) -> bool:
        """Whether the scores are trained; otherwise they are only stored."""

    @property
    def fixed(self) -> bool:
        """Whether the masks of the start stay for good."""

    @property
    def remembers(self) -> bool:
        """Whether the scores are a memory that :meth:`remember` renews at each step."""

    @property
    def guided(self) -> bool:
        """Whether masks go by a credit that hooks measure: :attr:`Draw.credit`."""

    @property
    def decay(self) -> float | None:
        """How fast weights outside the mask decay that learn on; None where only kept ones learn.

        They learn from the straight-through gradient, decay (SR-STE, arXiv 2102.04010, eq. 6) is
        added to it once per optimizer step.
        """

    @property
    def rescale(self) -> bool:
        """Whether weights are scaled so that what the first masks keep is as large as all was."""

    @property
    def relative(self) -> bool:
        """Whether the schedule's kappa counts in one over the spread of the layer's logits."""

    @property
    def moving_prior(self) -> float:
        """Strength of a prior that moves with the weights, in units of the logits' spread."""

    @property
    def step_size(self) -> float:
        """How far one optimizer step moves a score."""

    def pattern(self, nm: NM) -> NM:
        """The pattern that its masks have where ``nm`` is asked for."""

    def schedule(self, total_steps: int | None, nm: NM) -> Schedule:
        """The schedule it uses for layers of this pattern unless the user gives one."""

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """Initial scores of a weight in blocks ``(lead, M, inner)``; None for a method without."""

    def logits(self, weight: Tensor, scores: Tensor, draw: Draw) -> Tensor:
        """What masks are drawn from, differentiable in the scores: mostly the scores themselves.

        Args:
            weight: in blocks ``(lead, M, inner)``.
            scores: of the shape that :meth:`init_scores` gave them.
            draw: what else it depends on.
        """

    def train_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The bool mask of one training step before the freeze; exactly N of M where N are there.

        Args:
            weight: in blocks ``(lead, M, inner)``, the shape of the mask as well.
            logits: what :meth:`logits` gives, here and below.
            draw: what else it depends on.
        """

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """The deterministic bool mask that evaluation and ``fold`` use, and training once frozen.

        ``draw.key`` is that of step 0; weight and mask are blocks ``(lead, M, inner)``.
        """

    def score_grad(self, grad: Tensor, weight: Tensor, logits: Tensor, draw: Draw) -> Tensor:
        """Gradient of the scores, for methods that learn them.

        ``grad`` is that of the masked weight, so that dL/dmask = grad * weight; all in blocks
        ``(lead, M, inner)``.
        """

    def remember(self, weight: Tensor, scores: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """What weight and scores become before an optimizer step, if it ``remembers``.

        Args:
            weight: of one layer, in blocks ``(lead, M, inner)``.
            scores: of the shape that :meth:`init_scores` gave them.
            draw: what else it depends on; its view is that of the layer.
        """


def kept(tensor: Tensor, mask: Tensor, undrawn: float = 0.0) -> Tensor:
    """Zeros where the mask is False, in the same memory format, which masked_fill would drop.

    With ``undrawn`` the values there are multiplied with it instead.

    Args:
        tensor: weight or gradient, any floating type; NaN and infinity are masked like the rest.
        mask: bool, of the same shape.
        undrawn: a factor.
    """
    found = native.kept(tensor, mask, undrawn)
    if found is not None:
        return found
    if undrawn and (tensor.device.type != "cpu" or kernels() is None):
        if mask.stride() != tensor.stride():
            mask = torch.empty_like(tensor, dtype=torch.bool).copy_(mask)
        return torch.where(mask, tensor, tensor * undrawn)
    # masks as bits: ten times as fast as torch.where or masked_fill, and 0 * NaN is no question
    bits = tensor.view(_BITS[tensor.element_size()])
    drawn = torch.bitwise_and(bits, mask.view(torch.int8).neg()).view(tensor.dtype)
    return drawn.add_(kept(tensor, ~mask), alpha=undrawn) if undrawn else drawn


_BITS = MappingProxyType({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64})


METHODS: Mapping[str, str] = MappingProxyType(
    {
        "activity": "activity:Activity",
        "cyclical": "cyclical:Cyclical",
        "dense": "dense:Dense",
        "magnitude": "magnitude:Magnitude",
        "maskllm": "maskllm:MaskLLM",
        "random": "random:RandomMask",
        "regrow": "regrow:Regrow",
        "spikenm": "spikenm:SpikeNM",
        "srste": "srste:SRSTE",
        "uticket": "uticket:UTicket",
    }
)
"""Names that ``sparsify(method=...)`` and recipes know, and where each class is."""


def method_named(method: str | Method, **options: object) -> Method:
    """The method of that name, or the given instance itself.

    Args:
        method: name or instance.
        options: attributes of the named method that are not its defaults.

    Raises:
        PlanError: for an unknown name, with the nearest known one, and for what is no method.
    """
    if isinstance(method, str):
        return method_class(method)(**options)
    if isinstance(method, type) or not hasattr(method, "final_mask"):
        raise PlanError(
            f"method={method!r}: give a name of {sorted(METHODS)} or an instance of one"
        )
    return method


def method_class(name: str) -> type[Method]:
    """The class of the method of that name, a dataclass.

    Raises:
        PlanError: for an unknown name, with the nearest known one.
    """
    if name not in METHODS:
        known = f"{sorted(METHODS)}{did_you_mean(name, METHODS)}"
        raise PlanError(f"method {name!r} is unknown; known are {known}")
    module, _, class_name = METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(f"{__name__}.{module}"), class_name)
    return found
