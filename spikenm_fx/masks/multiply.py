# SPDX-License-Identifier: Apache-2.0
"""The weight that a layer uses: one elementwise, differentiable function of parameter and mask.

Nothing is counted and nothing is looked up here: what a step, a freeze or a loaded checkpoint means
is decided where the mask is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikenm_fx.masks.methods import kept

__all__ = ["multiply", "multiply_anywhere"]


def multiply(
    weight: Tensor,
    mask: Tensor,
    undrawn: float,
    *,
    straight: bool,
    on_backward: Callable[[], None],
) -> Tensor:
    """``weight`` where ``mask`` is True, ``undrawn`` times it elsewhere; fast on plain tensors.

    Args:
        weight: the dense parameter.
        mask: bool, of its shape.
        undrawn: factor of what is not drawn, 0 but in a fade.
        straight: whether the gradient passes the mask unchanged, so that weights outside learn.
        on_backward: called in each backward pass.
    """
    return _Multiply.apply(weight, mask, undrawn, straight, on_backward)  # type: ignore[no-untyped-call,no-any-return]


def multiply_anywhere(
    weight: Tensor, mask: Tensor, undrawn: Tensor | None, *, straight: bool
) -> Tensor:
    """The same in torch's own operations: for compilers, exports and the transforms of torch.func.

    Args:
        weight: the dense parameter.
        mask: bool, of its shape.
        undrawn: a scalar, None for 0.
        straight: as in :func:`multiply`.
    """
    return _Anywhere.apply(weight, mask, undrawn, straight)  # type: ignore[no-untyped-call,no-any-return]


class _Multiply(torch.autograd.Function):
    """Nothing goes through ``save_for_backward``: recomputed checkpoints share the node."""

    @staticmethod
    def forward(
        weight: Tensor, mask: Tensor, undrawn: float, straight: bool, on_backward: Any
    ) -> Tensor:
        return kept(weight, mask, undrawn)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.mask, ctx.undrawn, ctx.straight, ctx.on_backward = inputs
        ctx.version = _version(ctx.mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if _version(ctx.mask) != ctx.version:
            raise RuntimeError(
                "the masks were drawn anew between forward and backward; call backward before "
                "optimizer.step()"
            )
        ctx.on_backward()
        if not ctx.straight:
            grad = _Multiply.apply(grad, ctx.mask, ctx.undrawn, False, _nothing)  # type: ignore[no-untyped-call]
        return grad, None, None, None, None


class _Anywhere(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, undrawn: Tensor | None, straight: bool) -> Tensor:
        other = weight.new_zeros(()) if undrawn is None else weight * undrawn
        return torch.where(mask, weight, other)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, undrawn, ctx.straight = inputs
        if not ctx.straight:
            ctx.save_for_backward(mask, undrawn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.straight:
            mask, undrawn = ctx.saved_tensors
            grad = _Anywhere.apply(grad, mask, undrawn, False)  # type: ignore[no-untyped-call]
        return grad, None, None, None


def _version(mask: Tensor) -> int:
    return 0 if mask.is_inference() else mask._version


def _nothing() -> None:
    """Of the backward pass of a backward pass."""
