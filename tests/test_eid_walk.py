# SPDX-License-Identifier: Apache-2.0
"""Gradients in the middle of a graph, node by node: autograd's, and nobody's hooks are run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.masks.eid.walk import gradients_without_hooks


class TwoOfThree(torch.autograd.Function):
    """Takes a number between two tensors, and gives two."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        return x * factor, y + 1

    @staticmethod
    def backward(ctx, one: Tensor, other: Tensor) -> tuple[Tensor, None, Tensor]:
        return one * ctx.factor, None, other


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "a norm": lambda y: nn.BatchNorm2d(4)(y),
    "a pool": lambda y: F.avg_pool2d(y, 2),
    "a residual": lambda y: y + F.relu(y * 2),
    "parts": lambda y: torch.cat([half * n for n, half in enumerate(y.split(2, dim=1))]),
    "one of some": lambda y: y.unbind(1)[1],
    "two outputs": lambda y: TwoOfThree.apply(y.sin(), 3.0, y)[0],
    "a neuron": lambda y: SequenceLIF()(y),
    "views": lambda y: y.flatten(1).transpose(0, 1).unflatten(0, (4, 16)),
    "written in place": lambda y: (y * 1).mul_(3).add_(1),
    "not at all": lambda y: torch.ones_like(y, requires_grad=True) * 2,
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_autograd(way: str) -> None:
    """Also for several outputs at once, one of which takes no part; the graph stays usable."""
    x = torch.randn(3, 4, 4, 4, requires_grad=True)
    first, second = x * 1.5, x.exp()
    called = []
    result = WAYS[way](first)
    for tensor in (first, result):
        tensor.register_hook(lambda grad: called.append(grad.shape))
    grad = torch.randn(result.shape)
    own = gradients_without_hooks(result, grad, [first, second])
    assert not called
    expected = torch.autograd.grad(
        result, [first, second], grad, retain_graph=True, allow_unused=True
    )
    for found, wanted in zip(own, expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    result.sum().backward()
    assert called
