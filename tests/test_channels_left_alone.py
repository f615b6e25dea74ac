# SPDX-License-Identifier: Apache-2.0
"""What every verb on channels leaves alone, and that an end half-way leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.channels import permute, plan_permutation, remove_channels, remove_dead_channels

X = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0)) * 4


def half(model: nn.Module, x: Tensor) -> object:
    return remove_channels(model, x, keep=0.5)


VERBS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "permute": permute,
    "remove_dead": remove_dead_channels,
    "remove": half,
}


def reasons_of(verb: str, model: nn.Module) -> str:
    """Why groups stay, as the verb tells it."""
    entries = plan_permutation(model, X) if verb == "permute" else VERBS[verb](model, X)
    return " ".join(entry.reason for entry in entries.groups)


def shapes_and_values(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    return str(model), {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: tuple[str, dict[str, Tensor]]) -> bool:
    words, values = shapes_and_values(model)
    return words == before[0] and all(torch.equal(values[name], before[1][name]) for name in values)


class Chain(nn.Module):
    """Three layers of 16 with neurons between them; the first channels of the second are dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.lif = SequenceLIF()
        with torch.no_grad():
            self.b.weight[:, :3] = 0
            self.c.weight[:, :3] = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.lif(self.b(self.lif(self.a(x)))))


class Residual(Chain):
    """Its input joins what the first layer makes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.lif(self.b(self.lif(self.a(x)) + x)))


class Opaque(Chain):
    """An operation that depends on the order of the channels stands behind the first neuron."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.lif(self.b(torch.cumsum(self.lif(self.a(x)), dim=-1))))


@pytest.mark.parametrize("verb", VERBS)
def test_the_chain_is_changed(verb: str) -> None:
    """The control: without what the other tests add, each verb does something."""
    model = Chain()
    before = shapes_and_values(model)
    VERBS[verb](model, X)
    assert not unchanged(model, before)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Residual, "input of the model"),
        (Opaque, "no rule for cumsum"),
        (Chain, "output of the mod"),
    ],
)
def test_frozen_channels_stay_with_a_reason(verb: str, kind: type[Chain], says: str) -> None:
    """Channels of the input, of the output, before opaque parts; the other groups change."""
    model = kind()
    before = model.a.weight.detach().clone(), model.c.bias.detach().clone()
    assert says in reasons_of(verb, copy.deepcopy(model))
    VERBS[verb](model, X)
    assert torch.equal(model.c.bias, before[1])
    assert (kind is Chain) != torch.equal(model.a.weight, before[0])
    assert model(X).shape == X.shape


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("how", ["parameter", "view", "expanded"])
def test_shared_memory_stays_with_a_reason(verb: str, how: str) -> None:
    """One parameter of two layers, a view of another's, one number for all rows."""
    model = Chain()
    if how == "parameter":
        model.c.weight = model.b.weight
    elif how == "view":
        model.c.weight = nn.Parameter(model.b.weight.data)
    else:
        model.b.bias = nn.Parameter(torch.zeros(1).expand(16))
        model.a.bias = nn.Parameter(torch.zeros(1).expand(16))
    before = shapes_and_values(model)
    reasons = reasons_of(verb, copy.deepcopy(model) if how == "parameter" else model)
    # one parameter of two layers couples their channels, here with the output's
    says = {"parameter": "output of the model", "view": "shares its memory with"}
    assert says.get(how, "is expanded") in reasons
    VERBS[verb](model, X)
    assert unchanged(model, before)


@pytest.mark.parametrize("verb", VERBS)
def test_weights_in_any_memory_order_are_changed_as_contiguous_ones(verb: str) -> None:
    """Transposed storage: the same channels, the same values."""
    model, plain = Chain(), Chain()
    for layer in (model.a, model.b, model.c):
        layer.weight = nn.Parameter(layer.weight.data.T.contiguous().T)
    VERBS[verb](model, X)
    VERBS[verb](plain, X)
    assert unchanged(model, shapes_and_values(plain))


@pytest.mark.parametrize("verb", ["remove_dead", "remove"])
def test_an_interruption_half_way_leaves_the_model_as_it_was(verb: str) -> None:
    """Ctrl-C while the smaller model is tried, after channels were cut."""

    class Interrupted(Chain):
        def forward(self, x: Tensor) -> Tensor:
            if self.b.in_features < 16:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted()
    before, parameter = shapes_and_values(model), model.b.weight
    with pytest.raises(KeyboardInterrupt):
        VERBS[verb](model, X)
    assert unchanged(model, before)
    assert model.b.weight is parameter
