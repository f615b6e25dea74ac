# SPDX-License-Identifier: Apache-2.0
"""Models without some of their channels, stored and loaded again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from profiles import tries
from snn_strategies import random_nets
from torch import Tensor, nn
from zoo_cases import build

from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.channels import (
    load_smaller,
    remove_channels,
    remove_dead_channels,
    save_smaller,
)
from spikenm_fx.checkpoint import load_metadata, load_state, save_state
from spikenm_fx.errors import CheckpointError
from spikenm_fx.state import reset_to_rest


class Depthwise(nn.Module):
    """A depthwise convolution, a norm, and a constant that moves into a new bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.lif, self.norm = nn.Conv2d(2, 8, 1), SequenceLIF(), nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.dw(self.norm(self.lif(self.a(x))))))


X = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(1)) * 4


def smaller() -> nn.Module:
    model = Depthwise().eval()
    with torch.no_grad():
        model.up.weight[[1, 5]] = 0
        model.b.weight[:, 3] = 0
    assert remove_dead_channels(model, X).removed == 3
    return model


def test_what_was_removed_is_loaded_into_a_model_as_it_was_built(tmp_path: Path) -> None:
    """Shapes, groups and sizes follow the file; outputs are bit-identical, parameters the same."""
    model, file = smaller(), tmp_path / "smaller.safetensors"
    save_smaller(file, model, metadata={"from": "here"})
    assert load_metadata(file)["from"] == "here"
    loaded = Depthwise().eval()
    parameter = loaded.dw.weight
    load_smaller(loaded, file)
    assert loaded.dw.weight is parameter
    assert torch.equal(loaded(X), model(X))
    assert [str(m) for m in loaded.modules()] == [str(m) for m in model.modules()]
    assert loaded.dw.groups == loaded.up.in_channels == 6
    assert loaded.up.out_channels == 7


def test_a_bias_that_came_into_being_is_loaded(tmp_path: Path) -> None:
    """A dead neuron's constant went into a layer that had no bias."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    def built() -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8).eval()
        nn.init.uniform_(norm.bias, 0.5, 1.0)
        return nn.Sequential(
            *(nn.Linear(6, 8), neuron.LIFNode(), nn.Linear(8, 8), neuron.LIFNode(), norm),
            nn.Linear(8, 2, bias=False),
        ).eval()

    model, x, file = built(), torch.rand(3, 6) * 4, tmp_path / "smaller.safetensors"
    with torch.no_grad():
        model[2].weight.mul_(8)  # the others can spike
        model[2].weight[:3], model[2].bias[:3] = 0.0, -1.0
    assert remove_dead_channels(model, x).removed == 3
    assert model[5].bias is not None
    save_smaller(file, model)
    loaded = built()
    load_smaller(loaded, file)
    reset_to_rest(model)
    assert torch.equal(loaded(x), model(x))


@tries(10)
@given(net=random_nets())
def test_random_networks_are_loaded_as_they_were_saved(
    tmp_path_factory: pytest.TempPathFactory, net: tuple[nn.Module, Tensor]
) -> None:
    """Joins, heads, groups, gates, concatenations: what ran before runs again, alike."""
    model, x = net
    whole = copy.deepcopy(model)
    remove_channels(model, x, keep=0.5)
    file = tmp_path_factory.mktemp("net") / "smaller.safetensors"
    save_smaller(file, model)
    load_smaller(whole, file)
    assert torch.equal(whole(x), model(x))


@pytest.mark.framework
@pytest.mark.parametrize("name", ["spikingjelly/sew_resnet18/m", "snntorch/conv", "norse/loop"])
def test_models_of_frameworks_are_loaded_as_they_were_saved(name: str, tmp_path: Path) -> None:
    """Built anew, cut to the file, and as many parameters as it holds."""
    case, again, file = build(name), build(name), tmp_path / "s.safetensors"
    remove_channels(case.model, case.inputs, keep=0.5)
    save_smaller(file, case.model)
    load_smaller(again.model, file)
    for key, value in case.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    again.reset(again.model)
    again.run()


def as_dense(file: Path) -> None:
    save_state(file, load_state(file))


def with_metadata(text: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        save_state(file, load_state(file), metadata={"spikenm_fx.removed": text})

    return change


def too_large(file: Path) -> None:
    state = load_state(file)
    state["b.weight"] = torch.zeros(4, 9, 1, 1)
    save_state(file, state, metadata=load_metadata(file))


def of_another(file: Path) -> None:
    save_smaller(file, nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (as_dense, "does not say that channels were removed"),
        (with_metadata("[1"), "damaged"),
        (with_metadata("[]"), "damaged"),
        (with_metadata(json.dumps({"groups": {"dw": 0}})), "damaged"),
        (with_metadata(json.dumps({"groups": {"dw": "many"}})), "damaged"),
        (too_large, "of another shape"),
        (of_another, "does not fit Depthwise"),
        (lambda file: file.write_bytes(b"no"), "not a complete safetensors file"),
        (lambda file: file.unlink(), "no such file"),
    ],
)
def test_files_that_do_not_fit_leave_the_model_as_it_was(
    tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    """Named with what is wrong; shapes, values and sizes are the old ones."""
    file = tmp_path / "smaller.safetensors"
    save_smaller(file, smaller())
    spoil(file)
    model = Depthwise().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    words = [str(module) for module in model.modules()]
    with pytest.raises(CheckpointError, match=says):
        load_smaller(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [str(module) for module in model.modules()] == words


def test_torch_files_are_refused(tmp_path: Path) -> None:
    """They have no metadata, so that no reader could tell what they are."""
    with pytest.raises(CheckpointError, match=r"give it that suffix"):
        save_smaller(tmp_path / "smaller.pt", Depthwise())
    assert not list(tmp_path.iterdir())
