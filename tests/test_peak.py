# SPDX-License-Identifier: Apache-2.0
"""How much memory verbs take meanwhile, in units of a large weight, and long runs in all."""

from __future__ import annotations

import json

import pytest
import torch
from forks import forked
from loops import heard
from torch import nn

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.bench import peak
from spikenm_fx.bench.peak import VERBS, Counted, flat
from spikenm_fx.masks import piece
from spikenm_fx.pack import packing
from spikenm_fx.pack.engine import choose

WIDTH, SMALLER = 2048, 4
"""Pieces, and what counts as a large weight, are as much smaller as this one is than 4096."""
MOST = {
    "sparsify": 2.6,
    "train": 3.5,
    "evaluate": 1.8,
    "fold": 0.8,
    "verify": 1.0,
    "pack": 3.0,
}
"""Weights over the memory at the start: of masks and logits 1.25, of gradient and momentum 2."""


def _counted() -> None:
    """Prints what each verb takes, with smaller pieces."""
    piece._ON_CPU //= SMALLER
    choose.LARGE //= SMALLER
    peak.main(["--here", "counted", "--width", str(WIDTH)])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["native", "torch"])
def test_verbs_on_a_large_layer_take_a_few_times_its_weight(path: str, tmp_path: object) -> None:
    """By the compiled kernels and without them, counted tensor by tensor."""
    without = {"SPIKENM_FX_BUILD": "0", "SPIKENM_FX_CACHE": str(tmp_path)}
    ran = forked(_counted, **(without if path == "torch" else {}))
    assert ran.status == 0, ran.err[-3000:]
    found = json.loads(ran.out.splitlines()[-1])
    assert sorted(found) == sorted(VERBS)
    assert {name: peak for name, peak in found.items() if peak > MOST[name]} == {}
    assert found["train"] > 1.9, "gradient and momentum are there: the counter counts"


def test_counter_counts_numpys_memory_and_torchs() -> None:
    """Tensors of both, also those that are gone again; not those that were there before."""
    import numpy as np

    there = torch.ones(1000)
    with Counted([there]) as counted:
        (there + torch.ones(1000)).sum()
        made = torch.from_numpy(np.empty(1 << 16, dtype=np.float32))
        made.add_(1)
    assert 4 * (1 << 16) <= counted.peak < 4 * (1 << 16) + 100_000


@pytest.mark.slow
def test_a_long_run_stays_flat() -> None:
    """Refreshes of credits and evaluations included: as many bytes and storages as before."""
    (early, late) = flat((60, 180)).values()
    assert late == early


def test_engines_of_large_layers_own_their_memory() -> None:
    """While packing weights are shared with the model; what comes out is nobody else's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 600), nn.Tanh(), nn.Linear(600, 512))
    spikenm_fx.sparsify(model, "2:4", rules=[Rule("0")], method="magnitude")
    spikenm_fx.fold(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(8, 512)
    engine = spikenm_fx.pack(model, x)
    expected = engine(x)
    for parameter in model.parameters():
        parameter.data.fill_(3.0)
    assert torch.equal(engine(x), expected)
    for tensor in (*engine.parameters(), *engine.buffers()):
        tensor.data.zero_()
    assert all(bool((p == 3.0).all()) for p in model.parameters())
    assert all(value.shape == before[key].shape for key, value in model.state_dict().items())


class Clamped(nn.Module):
    """Writes into its weight in its forward, as networks with positive weights do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(512, 600)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.weight.data.clamp_(min=-0.01)
        return self.layer(x)


def test_packing_a_model_that_writes_into_its_weights_leaves_it_alone() -> None:
    """It runs on copies that share no memory with it."""
    model = Clamped()
    before = model.layer.weight.detach().clone()
    assert bool((before < -0.01).any())
    with heard() as told:
        engine = spikenm_fx.pack(model.eval(), torch.rand(4, 512))
    assert torch.equal(model.layer.weight, before)
    assert "layer differs" in told[0]
    assert packing(engine).proof.put_back == ("layer",)
