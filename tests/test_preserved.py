# SPDX-License-Identifier: Apache-2.0
"""A model is put back as it was, whether its parameters are watched or copied at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spikenm_fx.state import preserved


@pytest.mark.parametrize("at_once", [0, 100, 2**20])
def test_what_a_block_did_to_parameters_is_undone(at_once: int) -> None:
    """Values, memory and gradients; what nobody wrote into keeps its version, NaN as well."""
    written, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model, untouched, grad = nn.Sequential(written, other), other.weight, torch.ones(4, 4)
    written.weight.grad = grad
    untouched.data.fill_(float("nan"))
    place, version = written.bias.data_ptr(), untouched._version
    kept = [written.weight.detach().clone(), written.bias.detach().clone()]
    with preserved(model, at_once=at_once):
        written.weight.data.mul_(2).numpy()[0, 0] = 7.0
        grad.zero_()
        written.weight.grad = None
        written.bias.data = torch.zeros(4)
        model(torch.rand(2, 4))
    assert torch.equal(written.weight, kept[0])
    assert torch.equal(written.bias, kept[1])
    assert written.bias.data_ptr() == place
    assert written.weight.grad is grad
    assert torch.equal(grad, torch.ones(4, 4))
    assert untouched._version == version


def test_copies_are_good_for_every_try() -> None:
    """What is yielded restores inside the block, as often as it is called."""
    layer = nn.Linear(3, 3)
    kept = layer.weight.detach().clone()
    with preserved(layer, at_once=2**20) as restore:
        for _ in range(2):
            layer.weight.data.add_(1)
            assert not torch.equal(layer.weight, kept)
            restore()
            assert torch.equal(layer.weight, kept)
