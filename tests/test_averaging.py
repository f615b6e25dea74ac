# SPDX-License-Identifier: Apache-2.0
"""Averages, copies, swaps of parameters: evaluation uses the masks that its tensors imply."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import (
    close,
    final_masks,
    heard,
    masks,
    same,
    sequences,
    sparse,
    sparse_spiking,
    step_of,
    train,
    train_step,
    twin,
)
from profiles import tries
from strategies import ALL_LAYERS, batches, most_nonzero, network
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

import spikenm_fx
from spikenm_fx.masks.methods.spikenm import SpikeNM

pytestmark = pytest.mark.slow

TOTAL = 20
FREEZE = 17  # 0.85 of it
Update = Callable[[nn.Module, nn.Module, float], None]


def _polyak(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(p, 1 - decay)


def _polyak_data(average: nn.Module, model: nn.Module, decay: float) -> None:
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.data = decay * a.data + (1 - decay) * p.data


def _foreach(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        ours, theirs = list(average.parameters()), list(model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)


def _state_dict(average: nn.Module, model: nn.Module, decay: float) -> None:
    """As timm's ModelEma: in place over the tensors of the state dict."""
    with torch.no_grad():
        pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
        for a, p in pairs:
            a.copy_(decay * a + (1 - decay) * p)


def _vector(average: nn.Module, model: nn.Module, decay: float) -> None:
    mine = parameters_to_vector(average.parameters())
    other = parameters_to_vector(model.parameters())
    vector_to_parameters((decay * mine + (1 - decay) * other).detach(), average.parameters())


def _load(average: nn.Module, model: nn.Module, decay: float) -> None:
    """A new state of averaged floating-point entries, loaded as a whole."""
    mine, other = average.state_dict(), model.state_dict()
    average.load_state_dict(
        {
            k: decay * mine[k] + (1 - decay) * v if v.is_floating_point() else v
            for k, v in other.items()
        }
    )


UPDATES: dict[str, Update] = {
    "Polyak": _polyak,
    "Polyak through .data": _polyak_data,
    "foreach": _foreach,
    "state dict in place": _state_dict,
    "vector_to_parameters": _vector,
    "loaded": _load,
}


def averaged(kind: str, model: nn.Module) -> tuple[nn.Module, Callable[[], Any]]:
    """An average that starts as a copy of the model, and what updates it."""
    if kind in UPDATES:
        average = twin(model)
        return average, lambda: UPDATES[kind](average, model, 0.7)
    name, _, buffers = kind.partition(", ")
    multi = get_ema_multi_avg_fn(0.7) if name == "EMA" else get_swa_multi_avg_fn()
    wrapped = AveragedModel(model, multi_avg_fn=multi, use_buffers=buffers == "buffers")
    return wrapped.module, lambda: wrapped.update_parameters(model)


KINDS = [*UPDATES, "EMA", "EMA, buffers", "SWA", "SWA, buffers"]


def loaded_with(model: nn.Module, nm: str, **options: Any) -> nn.Module:
    """Another model, with the tensors of this one loaded into it."""
    other = sparse(nm, seed=9, **options)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nm", ["2:4", "1:8"])
def test_an_average_evaluates_what_it_holds(kind: str, nm: str) -> None:
    """At every step, before the freeze and after, as a model into which its tensors were loaded."""
    model = sparse(nm, total_steps=TOTAL, method=SpikeNM(fade=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    average, update = averaged(kind, model)
    probe = batches(1, seed=9)[0]
    for step, x in enumerate(batches(TOTAL)):
        train_step(model, optimizer, x)
        before = model.state_dict(), masks(model)
        update()
        assert same(before[0], model.state_dict())
        assert same(before[1], masks(model)), "the live model's masks are its own"
        if step % 4 and step < FREEZE - 2:
            continue
        other = loaded_with(average, nm, total_steps=TOTAL, method=SpikeNM(fade=0.0))
        assert torch.equal(average.eval()(probe), other.eval()(probe)), step
        for layer in (average[0], average[2], average[4]):
            assert most_nonzero(layer.weight, spikenm_fx.NM(*map(int, nm.split(":")))) <= int(nm[0])
    assert step_of(model) == TOTAL


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("at", [0, 5, FREEZE, TOTAL], ids=["start", "middle", "freeze", "end"])
def test_a_copy_that_takes_all_over_is_the_model(kind: str, at: int) -> None:
    """Decay 0: a copy made before training, given the parameters, evaluates as the live model."""
    model = sparse(total_steps=TOTAL)
    copied = twin(model)
    train(model, torch.optim.Adam(model.parameters(), lr=0.02), batches(at))
    UPDATES[kind](copied, model, 0.0)
    probe = batches(1, seed=9)[0]
    assert torch.equal(copied.eval()(probe), model.eval()(probe))
    assert same(masks(copied), masks(model))


@pytest.mark.parametrize("kind", ["Polyak", "EMA", "EMA, buffers", "state dict in place"])
@pytest.mark.parametrize("nm", ["2:4", "1:8"])
def test_an_average_has_the_masks_of_the_frozen_model(kind: str, nm: str) -> None:
    """Once averaged logits are the live ones to rounding, so are the masks."""
    model = sparse(nm, total_steps=2 * TOTAL, method=SpikeNM(fade=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    average, update = averaged(kind, model)
    for x in batches(2 * TOTAL + 20):
        with heard():  # past total_steps
            train_step(model, optimizer, x)
        update()
    pairs = zip(final_masks(average).values(), final_masks(model).values(), strict=True)
    agree = torch.cat([(a == b).flatten() for a, b in pairs]).float().mean()
    assert agree > 0.98


def test_an_average_goes_on_training() -> None:
    """Weights of an EMA taken into the live model: it trains on, N:M, and counts on."""
    model = sparse(total_steps=TOTAL)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    average, update = averaged("EMA", model)
    for x in batches(8):
        train_step(model, optimizer, x)
        update()
    model.load_state_dict(average.state_dict(), strict=False)
    start = step_of(model)
    train(model, optimizer, batches(4))
    assert step_of(model) == start + 4
    spikenm_fx.verify(model).raise_if_invalid()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_copy_that_is_trained_itself_counts_its_own_steps(steps: int) -> None:
    """The model it was made of has gone on meanwhile: the copy is no average of it."""
    model, fresh = sparse(total_steps=TOTAL), sparse(total_steps=TOTAL)
    copied = twin(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), batches(TOTAL - 2))
    for one in (copied, fresh):
        train(one, torch.optim.SGD(one.parameters(), lr=0.05), batches(steps))
    assert step_of(copied) == step_of(fresh) == steps
    assert same(fresh.state_dict(), copied.state_dict())
    assert same(masks(fresh.train()), masks(copied.train()))


@pytest.mark.parametrize("how", ["pointers", "values", "state dicts"])
@pytest.mark.parametrize("steps", [6, TOTAL], ids=["annealing", "frozen"])
def test_swapped_for_validation(how: str, steps: int) -> None:
    """EMA weights swapped in and out: validation is the average's, training as if never swapped."""
    model, plain = sparse(total_steps=TOTAL + 9), sparse(total_steps=TOTAL + 9)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.02) for m in (model, plain)]
    average, update = averaged("Polyak", model)
    probe = batches(1, seed=9)[0]

    def swap() -> None:
        if how == "state dicts":
            mine = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average.state_dict())
            average.load_state_dict(mine)
            return
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            if how == "pointers":
                a.data, p.data = p.data, a.data
            else:
                with torch.no_grad():
                    before = p.clone()
                    p.copy_(a)
                    a.copy_(before)

    for x in batches(steps):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            train_step(each, optimizer, x)
        update()
        expected = average.eval()(probe)
        swap()
        assert torch.equal(model.eval()(probe), expected)
        swap()
        model.train()
    close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=0, atol=0)
    assert torch.equal(model.eval()(probe), plain.eval()(probe))


@tries(15)
@given(st.integers(0, TOTAL), st.integers(0, 99), st.sampled_from(["copy_", "data", "set", "mul"]))
def test_whatever_is_written_is_evaluated(steps: int, seed: int, how: str) -> None:
    """Random weights and logits, written in any way at any time, are those of evaluation."""
    model = sparse(total_steps=TOTAL)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), batches(steps))
    probe = batches(1, seed=9)[0]
    model.eval()(probe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            value = parameter + 0.3 * torch.randn(parameter.shape, generator=generator)
            if how == "copy_":
                parameter.copy_(value)
            elif how == "data":
                parameter.data.copy_(value)
            elif how == "set":
                parameter.data = value
            else:
                parameter.mul_(-1.5)
    other = loaded_with(model, "2:4", total_steps=TOTAL)
    assert torch.equal(model(probe), other.eval()(probe))
    assert same(masks(model), masks(twin(model)))


def test_batch_norm_statistics_of_an_average() -> None:
    """update_bn runs the average in training mode: no step, and evaluation as before it."""
    net = nn.Sequential(*network()[:3], nn.BatchNorm1d(16), *network()[3:])
    model = spikenm_fx.sparsify(net, rules=ALL_LAYERS, total_steps=TOTAL).train()
    average = AveragedModel(model)
    for x in batches(5):
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.01), x)
        average.update_parameters(model)
    before, step = final_masks(average.module), step_of(average.module)
    update_bn([*batches(4)], average)
    assert same(before, final_masks(average.module))
    assert step_of(average.module) == step


def test_a_soup_of_two_runs() -> None:
    """The mean of two checkpoints loads, is N:M, and folds into the masks it implies."""
    runs = [sparse(total_steps=TOTAL) for _ in range(2)]
    for seed, run in enumerate(runs):
        train(run, torch.optim.Adam(run.parameters(), lr=0.02), batches(TOTAL, seed=seed))
    soup = twin(runs[0])
    _load(soup, runs[1], 0.5)
    probe = batches(1, seed=9)[0]
    expected: Tensor = soup.eval()(probe)
    spikenm_fx.fold(soup)
    spikenm_fx.verify(soup, dict.fromkeys("024", "2:4")).raise_if_invalid()
    assert torch.equal(soup(probe), expected)


def test_a_copy_that_trains_itself_counts_its_own_steps() -> None:
    """Also where the model that it was copied from has gone on meanwhile."""
    model = sparse_spiking(total_steps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, sequences(2))
    copied = copy.deepcopy(model)
    others = torch.optim.Adam(copied.parameters(), lr=0.01)
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    more = sequences(3, seed=4)
    train(model, optimizer, more)
    train(copied, others, more)
    assert step_of(copied) == step_of(model) == 5
    assert same(dict(copied.state_dict()), dict(model.state_dict()))
