# SPDX-License-Identifier: Apache-2.0
"""One reading serves all verbs, and never one of a model that has changed since."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.trace import register_neuron, trace
from spikenm_fx.trace.execution.leaves import Limits

STEPS = 5


class Net(nn.Module):
    """Steps from a global, a plain object and an attribute; ``x`` is (N, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 8)
        self.config = SimpleNamespace(times=[1, 1])
        self.extra = 0
        self.table = torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        out = 0
        for _ in range(STEPS + self.extra + sum(self.config.times)):
            s = x
            for layer in self.layers:
                s = (layer(s * self.table) > 0.1).float()
            out = out + self.head(s)
        return out


def calls(net: nn.Module, x: Tensor) -> int:
    return trace(net, x).layers["head"].calls


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_trace_plan_and_masks_run_the_model_once() -> None:
    """Three verbs on the same model and example cost one forward."""
    runs = []

    class Counted(Net):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return super().forward(x)

    model, x = Counted(), torch.rand(3, 16)
    trace(model, x)
    plan = spikenm_fx.plan(model, "2:4", example_inputs=x)
    spikenm_fx.sparsify(model, "2:4", example_inputs=x)
    assert len(plan.sparse) == 1
    assert len(runs) == 1


def _deeper(net: Net) -> None:
    net.config.times.append(3)


def _other_layer(net: Net) -> None:
    net.layers[1] = nn.Linear(16, 16, bias=False)


def _through_data(net: Net) -> None:
    net.head.weight.data.mul_(2)


def _hook(net: Net) -> None:
    net.head.register_forward_pre_hook(lambda *_: None)


CHANGES = {
    "attribute": lambda net: setattr(net, "extra", 2),
    "object": lambda net: setattr(net.config, "times", [4]),
    "inside a list of an object": _deeper,
    "layer": _other_layer,
    "parameter written": lambda net: torch.nn.init.ones_(net.head.weight),
    "through .data": _through_data,
    "tensor attribute": lambda net: net.table.zero_(),
    "forward of the instance": lambda net: setattr(net, "forward", lambda x: net.head(x)),
    "hook": _hook,
    "a module more": lambda net: net.layers.append(nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_read(net: Net, change: str) -> None:
    """After each change of the model the reading is a new one."""
    x = torch.rand(3, 16)
    before = trace(net, x)
    assert trace(net, x) is before
    CHANGES[change](net)
    assert trace(net, x) is not before


def test_a_global_and_a_method_of_the_class_count(net: Net, monkeypatch) -> None:
    """What the forward names at the top of its file, and the forward itself, may change."""
    x = torch.rand(3, 16)
    assert calls(net, x) == 7
    monkeypatch.setitem(globals(), "STEPS", 9)
    assert calls(net, x) == 11
    monkeypatch.setattr(Net, "forward", lambda self, x: self.head(x))
    assert calls(net, x) == 1


def test_another_example_is_read(net: Net) -> None:
    """Another tensor, and the same one with other values."""
    x = torch.rand(3, 16)
    before = trace(net, x)
    assert trace(net, torch.rand(4, 16)) is not before
    before = trace(net, x)
    x.zero_()
    assert trace(net, x) is not before


def test_limits_ask_for_a_new_reading(net: Net) -> None:
    """Given limits, the model is read whatever is known."""
    x = torch.rand(3, 16)
    assert trace(net, x, limits=Limits()) is not trace(net, x, limits=Limits())


def test_a_registered_neuron_is_found_at_once() -> None:
    """Telling the tracer of a neuron class changes the next trace of the same model."""

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    model, x = nn.Sequential(nn.Linear(8, 8), Odd(), nn.Linear(8, 8)), torch.rand(2, 8)
    assert not trace(model, x).neurons
    register_neuron(Odd)
    assert "1" in trace(model, x).neurons


def test_the_reading_keeps_no_model_alive() -> None:
    """A model that nobody holds any more is freed, with what was read of it."""
    model = Net()
    layer = weakref.ref(model.head)
    graph = weakref.ref(trace(model, torch.rand(3, 16)).operations)
    gc.collect()
    assert graph() is not None
    del model
    gc.collect()
    assert graph() is None
    assert layer() is None
