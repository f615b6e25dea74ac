# SPDX-License-Identifier: Apache-2.0
"""What users do to a model after sparsify: it works, or an error or warning says that it does not.

Never silently nothing: a write that does not last, a layer that is no longer masked, masks that no
longer learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import (
    LAYERS,
    OverTime,
    any_moved,
    close,
    dense,
    final_masks,
    heard,
    logits,
    masked_modules,
    masks,
    refused,
    same,
    sequences,
    sparse,
    sparse_spiking,
    spiking_net,
    step_of,
    train,
    train_step,
)
from profiles import tries
from strategies import ALL_LAYERS, batches, most_nonzero, network
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import spikenm_fx
from spikenm_fx.errors import SpikeNMError

NM24 = spikenm_fx.NM(2, 4)


def is_nm(weight: Tensor, nm: spikenm_fx.NM = NM24) -> bool:
    return most_nonzero(weight, nm) <= nm.keep


# -- freezing -------------------------------------------------------------------------------------

NAMES = [name for name, _ in spiking_net().named_parameters()]


@tries(20)
@given(
    st.sets(st.sampled_from(NAMES), max_size=len(NAMES) - 1),
    st.sampled_from(["before sparsify", "before training", "midway"]),
    st.sampled_from(["SGD", "Adam"]),
)
def test_any_subset_can_be_frozen(names: set[str], when: str, kind: str) -> None:
    """With EID on: frozen weights do not move, the others do, masks stay N:M, steps are exact."""
    model = spiking_net()

    def freeze() -> None:
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.requires_grad_(False)

    if when == "before sparsify":
        freeze()
    spikenm_fx.sparsify(model, "2:4", rules=ALL_LAYERS).train()
    if when == "before training":
        freeze()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    data = sequences(5)
    with heard() as said:
        train(model, optimizer, data[:2])
        if when == "midway":
            freeze()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, data[2:])
    assert step_of(model) == 5
    assert len(said) <= 1, "at most one warning, that masks of frozen weights do not learn"
    now = dict(model.named_parameters())
    for name in NAMES:
        moved = not torch.equal(now[name], start[name])
        if name not in names and name.endswith("weight"):
            assert moved, name
        if name in names and when != "midway":  # Adam's momentum moves what is frozen midway
            assert not moved, name
    for layer in masked_modules(model).values():
        assert is_nm(layer.weight)
        assert is_nm(layer.eval().weight)


def test_frozen_weights_with_learnt_masks() -> None:
    """Only masks are to learn (as in MaskLLM): they do, or it is said that they do not."""
    model = sparse()
    for layer in masked_modules(model).values():
        layer.weight_dense.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    before, weights = logits(model), dense(model)
    with heard() as said:
        train(model, optimizer, batches(6))
    assert same(weights, dense(model))
    assert any_moved(before, logits(model)) or said


def test_frozen_batches_of_a_pretrained_trunk() -> None:
    """The trunk in evaluation and without gradients: its masks are final ones and stay."""
    model = sparse()
    for name in ("0", "2"):
        model.get_submodule(name).requires_grad_(False).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = masks(model)
    for x in batches(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    after = masks(model)
    assert torch.equal(before["0"], after["0"])
    assert torch.equal(before["2"], after["2"])
    assert step_of(model) == 4


# -- wrapping, replacing, deleting ----------------------------------------------------------------


class LoRA(nn.Module):
    """A low-rank adapter around a layer, as peft puts it there: the base layer is frozen."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) * 0.3)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_a.T @ self.lora_b.T


class Merged(LoRA):
    """The same, but it multiplies with the sum of weights, as merging adapters do."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.lora_b @ self.lora_a)


def wrap_dropout(model: nn.Module, name: str) -> nn.Module:
    return nn.Sequential(model.get_submodule(name), nn.Dropout(0.1))


def wrap_own(model: nn.Module, name: str) -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    return Scaled(model.get_submodule(name))


WRAPS: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "Sequential with Dropout": wrap_dropout,
    "own module": wrap_own,
}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, module)


@pytest.mark.parametrize("how", WRAPS)
@pytest.mark.parametrize("when", ["before the first forward", "midway"])
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "without"])
def test_wrapped_layers_stay_masked_and_learn(how: str, when: str, examples: bool) -> None:
    """The layer under its new name is masked, its logits move, EID goes on, fold finds it."""
    model = spiking_net()
    given_inputs = sequences(1)[0] if examples else None
    spikenm_fx.sparsify(model, "2:4", rules=ALL_LAYERS, example_inputs=given_inputs).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if when == "midway":
        train(model, optimizer, sequences(3))
    put(model, "2.layer", WRAPS[how](model, "2.layer"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    (inner,) = (n for n in masked_modules(model) if n.startswith("2.layer."))
    before, start = logits(model), step_of(model)
    train(model, optimizer, sequences(4, seed=2))
    assert step_of(model) == start + 4
    assert any(not torch.equal(before[k], v) for k, v in logits(model).items() if inner in k)
    assert is_nm(model.get_submodule(inner).weight)
    x = sequences(1)[0]
    expected = model.eval()(x)
    spikenm_fx.fold(model)
    assert torch.equal(model(x), expected)
    assert is_nm(model.get_submodule(inner).weight)
    assert not masked_modules(model)


@pytest.mark.parametrize("kind", [LoRA, Merged])
def test_low_rank_adapters(kind: type[LoRA]) -> None:
    """Adapters train over frozen masked layers, whose masks of training are those of evaluation.

    Or it is said that the masks of a layer that nobody steps are drawn ones.
    """
    model = sparse()
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), batches(3))
    for name in LAYERS:
        put(model, name, kind(model.get_submodule(name)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    weights = dense(model)
    with heard() as said:
        train(model, optimizer, batches(5))
    assert same(weights, dense(model))
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[n], p) for n, p in adapters.items() if n.endswith("lora_b"))
    assert all(is_nm(layer.weight) for layer in masked_modules(model).values())
    assert said or same(masks(model), final_masks(model))
    expected = model.eval()(batches(1)[0])
    spikenm_fx.fold(model)
    torch.testing.assert_close(model(batches(1)[0]), expected)


@pytest.mark.parametrize("how", ["replaced", "identity", "deleted", "other model"])
@pytest.mark.parametrize("when", ["before the first forward", "midway"])
def test_layers_that_are_gone(how: str, when: str) -> None:
    """The rest goes on: steps, learning, checkpoints, verify and fold."""
    model = sparse_spiking()
    if when == "midway":
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), sequences(2))
    gone = model[2].layer
    if how == "replaced":
        model[2] = OverTime(nn.Linear(16, 16))
    elif how == "identity":
        model[2] = nn.Identity()
    elif how == "deleted":
        del model[2]
    else:
        model = nn.Sequential(model[0], model[1], OverTime(nn.Linear(16, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = logits(model)
    try:
        start = step_of(model)
    except SpikeNMError:
        pytest.fail("the model still has masked layers")
    with heard() as said:
        train(model, optimizer, sequences(4, seed=3))
    unseen = (how, when) == ("other model", "before the first forward")
    assert [text[:3] for text in said] == ["EID"] * unseen, "EID is off there: told"
    assert step_of(model) == start + 4
    assert any_moved(before, logits(model))
    x = sequences(1)[0]
    expected = model.eval()(x)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    spikenm_fx.verify(model)
    spikenm_fx.fold(model)
    assert torch.equal(model(x), expected)
    assert not masked_modules(model)
    assert is_nm(gone.weight), "what was taken out is still what it was"


def test_a_new_head_before_fine_tuning() -> None:
    """The classifier is replaced by a wider one: its optimizer steps the rest's masks too."""
    model = sparse()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), batches(2))
    model[4] = nn.Linear(16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, batches(3))
    assert step_of(model) == 5
    assert set(masked_modules(model)) == {"0", "2"}


@pytest.mark.parametrize("how", ["assigned", "setattr", "register_parameter", "deleted first"])
def test_new_parameters(how: str) -> None:
    """Another Parameter under the same name is the weight behind the mask from then on."""
    model = sparse()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), batches(2))
    new = nn.Parameter(torch.randn(16, 16))
    if how == "assigned":
        model[2].weight = new
    elif how == "setattr":
        setattr(model[2], "weight", new)  # noqa: B010
    elif how == "register_parameter":
        model[2].register_parameter("weight", new)
    else:
        error = refused(lambda: delattr(model[2], "weight"))
        if error is not None:
            assert "fold" in error
            return
        model[2].weight = new
    assert model[2].weight_dense is new
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = new.detach().clone(), logits(model)
    for mode in (True, False):
        used = model.train(mode)[2].weight.detach()
        assert is_nm(used)
        assert torch.equal(used[used != 0], new.detach()[used != 0])
    model.train()
    train(model, optimizer, batches(2))
    assert not torch.equal(new, before[0])
    assert any_moved(before[1], logits(model))
    assert step_of(model) == 4


# -- re-parametrising -----------------------------------------------------------------------------


def old_weight_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.weight_norm(layer)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return torch.nn.utils.spectral_norm(layer)


def own_parametrization(layer: nn.Module) -> nn.Module:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    return parametrize.register_parametrization(layer, "weight", Half())


REPARAMETRISED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": own_parametrization,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "random pruning": lambda layer: prune.random_structured(layer, "weight", 0.5, dim=0),
}


@pytest.mark.parametrize("how", REPARAMETRISED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrised_weights(how: str) -> None:
    """N:M, trained and folded, or refused with the way out and without half a change."""
    model, x = sparse(), batches(1)[0]
    expected, keys = model.eval()(x), set(model.state_dict())
    model.train()
    error = refused(lambda: REPARAMETRISED[how](model[2]))
    if error is not None:
        assert "fold" in error
        assert set(model.state_dict()) == keys
        assert torch.equal(model.eval()(x), expected)
        train(model.train(), torch.optim.SGD(model.parameters(), lr=0.01), batches(2))
        assert step_of(model) == 2
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, batches(2))
    assert step_of(model) == 2
    for mode in (True, False):
        assert is_nm(model.train(mode)[2].weight)
    expected = model(x)
    spikenm_fx.fold(model)
    torch.testing.assert_close(model(x), expected)
    assert is_nm(model[2].weight)


@pytest.mark.parametrize("how", ["bias", "another layer", "removed again"])
def test_parametrisations_of_other_tensors(how: str) -> None:
    """A parametrised bias or another layer's weight disturbs no mask and is not lost in fold."""

    class Absolute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    model = spikenm_fx.sparsify(network()).train()  # only layer 2 is masked
    layer, key = (model[4], "weight") if how == "another layer" else (model[2], "bias")
    parametrize.register_parametrization(layer, key, Absolute())
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), batches(2))
    if how == "removed again":
        parametrize.remove_parametrizations(layer, key)
    x = batches(1)[0]
    expected = model.eval()(x)
    assert is_nm(model[2].weight)
    spikenm_fx.fold(model)
    assert torch.equal(model(x), expected)
    assert parametrize.is_parametrized(layer) == (how != "removed again")


def test_low_rank_parametrisation_of_a_masked_weight_deep_in_a_model() -> None:
    """The same in a submodule: the error, if there is one, names the layer."""
    model = spikenm_fx.sparsify(nn.ModuleDict({"body": network()}))
    error = refused(lambda: parametrizations.weight_norm(model["body"][2]))
    assert is_nm(model["body"][2].weight)
    assert error is None or "body.2" in error


# -- initialising and writing ---------------------------------------------------------------------


def reset_parameters(layer: nn.Module) -> None:
    layer.reset_parameters()


def applied(layer: nn.Module) -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.3)

    layer.apply(init)


def in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(0.1)


def by_get_parameter(layer: nn.Module) -> None:
    try:
        parameter = layer.get_parameter("weight")
    except AttributeError as error:
        raise SpikeNMError(f"said: {error}") from error
    with torch.no_grad():
        parameter.mul_(0.1)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "reset_parameters": reset_parameters,
    "init.constant_": lambda layer: nn.init.constant_(layer.weight, 0.3),
    "init.kaiming_normal_": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "init.zeros_": lambda layer: nn.init.zeros_(layer.weight),
    "apply(init)": applied,
    "in place": in_place,
    "data.normal_": lambda layer: layer.weight.data.normal_(0, 0.01),
    "data.clamp_": lambda layer: layer.weight.data.clamp_(min=0),
    "data.mul_": lambda layer: layer.weight.data.mul_(0.1),
    "data assigned": lambda layer: setattr(layer.weight, "data", torch.full((16, 16), 0.3)),
    "get_parameter": by_get_parameter,
    "parameters()": lambda layer: [p.data.clamp_(-0.01, 0.01) for p in layer.parameters()],
    "named_parameters()": lambda layer: dict(layer.named_parameters())["weight"].data.mul_(0.1),
    "weight_dense": lambda layer: layer.weight_dense.data.mul_(0.1),
    "state_dict()": lambda layer: layer.state_dict()["weight_dense"].mul_(0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("after", ["sparsify", "steps", "freeze"])
def test_writes_last_or_are_refused(how: str, training: bool, after: str) -> None:
    """A write to the weight reaches the dense one, or a warning or error says that it did not."""
    model = sparse(total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, batches({"sparsify": 0, "steps": 3, "freeze": 9}[after]))
    model.train(training)
    model(batches(1)[0])
    before = model[2].weight_dense.detach().clone()
    with heard() as said:
        try:
            WRITES[how](model[2])
        except (SpikeNMError, RuntimeError) as error:
            said.append(str(error))
        model(batches(1)[0])  # at the latest at the next use
        assert is_nm(model[2].weight), "no write makes a masked layer dense"
        model.train()
        train_step(model, optimizer, batches(1)[0])
        assert is_nm(model[2].weight)
    lasted = (model[2].weight_dense - before).abs().max() > 0.02
    assert lasted or said, f"{how} did nothing, and nobody said so"


def test_clamping_all_weights_after_each_step() -> None:
    """Dale's law over ``model.parameters()`` holds at every use."""
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches(4):
        train_step(model, optimizer, x)
        for layer in masked_modules(model).values():
            for parameter in layer.parameters(recurse=False):
                parameter.data.clamp_(min=0)
        for mode in (False, True):
            model.train(mode)
            assert all(float(m.weight.min()) >= 0 for m in masked_modules(model).values())
    assert step_of(model) == 4


def test_initialising_everything_is_as_before_sparsify() -> None:
    """Writing all parameters by name after sparsify gives a model that trains from them."""
    model, other = sparse(seed=3), network(seed=5)
    values = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    close(
        dense(model),
        {k: values[f"{k}.weight"].detach() for k in LAYERS},
    )
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), batches(2))
    spikenm_fx.verify(model).raise_if_invalid()
