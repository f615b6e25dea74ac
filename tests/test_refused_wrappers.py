# SPDX-License-Identifier: Apache-2.0
"""Wrappers and copies that know nothing of masks, in one process: each is refused by name."""

from __future__ import annotations

import pytest
import torch
from loops import masks, refused, same, sequences, sparse_spiking
from strategies import ALL_LAYERS
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.masks import piece


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_layer_with_two_names_loads_strictly() -> None:
    """``dense_state_dict`` has the dense model's keys, both names of them."""
    model = spikenm_fx.sparsify(Twice(), "2:4", rules=ALL_LAYERS)
    plain = Twice()
    plain.load_state_dict(spikenm_fx.dense_state_dict(model))
    assert torch.equal(plain.first.weight, model.eval().second.weight)


def test_replicas_are_refused() -> None:
    """``nn.DataParallel`` makes them of every module before a forward on several devices."""
    layer = spikenm_fx.sparsify(Twice(), "2:4", rules=ALL_LAYERS).first
    text = refused(layer._replicate_for_data_parallel)
    assert text is not None
    assert "first (8, 8)" in text
    assert "DistributedDataParallel" in text


def test_tensor_parallel_layers_of_a_masked_one_are_refused() -> None:
    """SpikingJelly's copy a part of the weight, without its mask."""
    channel = pytest.importorskip(
        "spikingjelly.activation_based.distributed.tensor_parallel.channel"
    )
    model = spikenm_fx.sparsify(nn.Sequential(nn.Conv2d(4, 8, 3)), "2:4", rules=ALL_LAYERS)
    source = compile("read = lambda layer: layer.weight.detach()[:4].clone()", "copier", "exec")
    names = {"__name__": channel.__name__}
    exec(source, names)
    text = refused(lambda: names["read"](model[0]))
    assert text is not None
    assert "0 (8, 4, 3, 3)" in text
    assert "sparsify afterwards" in text


@pytest.mark.slow
@pytest.mark.parametrize(("nm", "steps"), [("2:4", 24), ("1:8", 24)])
def test_large_weights_in_pieces_have_the_same_masks(
    monkeypatch: pytest.MonkeyPatch, nm: str, steps: int
) -> None:
    """With EID, fade and freeze: steps in pieces are steps at once, bit by bit."""
    found = []
    for most in (2**21, 64):
        monkeypatch.setattr(piece, "_ON_CPU", most)
        model = sparse_spiking(nm, total_steps=steps + steps // 10).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        used = []
        for x in sequences(steps):
            optimizer.zero_grad()
            model(x.double()).square().mean().backward()
            optimizer.step()
            used.append(masks(model))
        found.append((used, model.state_dict()))
    (one, state), (other, in_pieces) = found
    for before, after in zip(one, other, strict=True):
        assert same(before, after)
    assert same(state, in_pieces)
