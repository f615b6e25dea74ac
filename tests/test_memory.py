# SPDX-License-Identifier: Apache-2.0
"""What a sparse model keeps alive between forward and backward, and after a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from loops import heard, sequences, sparse_spiking, spiking_net, train, train_step
from strategies import ALL_LAYERS
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.bench.nets.handwritten import StatefulLIF
from spikenm_fx.bench.worker import living
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM


@pytest.fixture(scope="module", autouse=True)
def _only_what_is_new() -> None:
    """What other tests have left behind need not be looked at again and again."""
    gc.collect()
    gc.freeze()


def test_at_most_two_weights_are_alive_between_forward_and_backward() -> None:
    """Beside parameters and activations a layer holds its masked weight and one bool mask."""
    model = nn.Sequential(nn.Linear(256, 128))
    spikenm_fx.sparsify(model, "2:4", rules=[Rule("0")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.randn(2, 256)).sum().backward()  # whatever is made once is there now
    optimizer.step()  # the next forward uses a new mask
    optimizer.zero_grad()
    before = living()
    loss = model(torch.randn(2, 256)).sum()
    after = living()
    new = sum(size for pointer, size in after.items() if pointer not in before)
    weight = model[0].weight_dense.untyped_storage().nbytes()
    assert weight <= new <= 2 * weight
    loss.backward()


@contextmanager
def activations(model: nn.Module) -> Iterator[list[weakref.ref]]:
    """Weak references to whatever goes into and out of every module meanwhile."""
    seen: list[weakref.ref] = []

    def note(_: nn.Module, args: tuple, output: Tensor) -> None:
        seen.extend(weakref.ref(t) for t in (*args, output) if isinstance(t, Tensor))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    yield seen
    for hook in hooks:
        hook.remove()


def alive(seen: list[weakref.ref], *, but: Tensor | None = None) -> int:
    def left() -> int:
        return sum(ref() is not None and ref() is not but for ref in seen)

    if left():
        gc.collect()
    return left()


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "first forward"])
def test_no_activation_outlives_its_step(examples: bool) -> None:
    """Between refreshes of the credits, on them, and after the freeze: all are gone."""
    model = spiking_net()
    given_inputs = sequences(1)[0] if examples else None
    spikenm_fx.sparsify(
        model,
        rules=ALL_LAYERS,
        total_steps=10,
        method=SpikeNM(eid=EID(every=3)),
        example_inputs=given_inputs,
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in sequences(10):
        with activations(model) as seen:
            train_step(model, optimizer, x)
        assert len(seen) > 8
        assert alive(seen, but=x) == 0


@pytest.mark.parametrize("step", [1, 2, 9], ids=["between", "between", "frozen"])
def test_between_refreshes_nothing_is_kept_for_eid(step: int) -> None:
    """With the loss alive and its graph freed, no activation is held but by the user."""
    model = sparse_spiking(total_steps=10)
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), sequences(step))
    x = sequences(1, seed=5)[0]
    with activations(model) as seen:
        model(x).square().mean().backward()
    assert alive(seen, but=x) == 0


def test_a_forward_without_backward_is_let_go() -> None:
    """A training forward whose output is dropped keeps nothing beyond the next step."""
    model = sparse_spiking()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = sequences(1)[0]
    for kept in (True, False):
        with torch.set_grad_enabled(kept), activations(model) as seen:
            model(x)
        train_step(model, optimizer, sequences(1, seed=7)[0])
        assert alive(seen, but=x) == 0


@pytest.mark.slow
def test_memory_after_a_step_is_memory_before() -> None:
    """Steps, evaluation, fade, freeze and refreshes: bytes and tensors neither grow nor pile up."""
    model = sparse_spiking("1:8", total_steps=15)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = sequences(15)
    measured = []
    with heard():
        for step, x in enumerate(data):
            train_step(model, optimizer, x)
            if step % 3 == 2:
                with torch.no_grad():
                    model.eval()(x)
                model.train()
                optimizer.zero_grad()
                alive = living()
                measured.append((sum(alive.values()), len(alive)))
    first = measured[1]
    assert all(now[0] <= first[0] and now[1] <= first[1] for now in measured[2:]), measured


def test_stateful_neurons_hold_only_their_own_state() -> None:
    """A neuron that keeps a graph through time is the user's; reset, and nothing is left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), StatefulLIF(), nn.Linear(16, 16), StatefulLIF())
    spikenm_fx.sparsify(model, rules=ALL_LAYERS, method=SpikeNM(eid=EID(every=2))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in sequences(5):
        optimizer.zero_grad()
        with activations(model) as seen:
            sum(model(now).square().mean() for now in x).backward()
        optimizer.step()
        for neuron in (model[1], model[3]):
            neuron.reset()
        assert alive(seen) <= len(x), "the user's own slices of the input"
