# SPDX-License-Identifier: Apache-2.0
"""Every ``autograd.Function.apply`` of a forward is seen, wherever the model keeps it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikenm_fx.errors import TraceError
from spikenm_fx.trace import neuron_spec, trace


class Spike(torch.autograd.Function):
    """Step with a boxcar surrogate; its second argument is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float = 1.0) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < 0.5), None


early = Spike.apply
table = {"deep": [("none", Spike.apply)]}
module_like = SimpleNamespace(act=Spike.apply)  # reached by nobody: a class of the standard library


def make_closure() -> Callable[[Tensor], Tensor]:
    bound = Spike.apply

    def act(x: Tensor) -> Tensor:
        return bound(x)

    return act


def with_default(x: Tensor, act: Callable[..., Tensor] = Spike.apply) -> Tensor:
    return act(x)


def with_keyword(x: Tensor, *, act: Callable[..., Tensor] = Spike.apply) -> Tensor:
    return act(x)


def indirect(x: Tensor) -> Tensor:
    return by_global(x)


def by_global(x: Tensor) -> Tensor:
    return early(x, 0.5)


def by_table(x: Tensor) -> Tensor:
    return table["deep"][0][1](x)


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return by_global(x)


class Holder:
    act = staticmethod(Spike.apply)

    def __init__(self) -> None:
        self.inner = {"act": Spike.apply}

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner["act"](x)


Pair = namedtuple("Pair", "name act")

PLACES: dict[str, Callable[[], Any]] = {
    "attribute": lambda: Spike.apply,
    "late": lambda: lambda x: Spike.apply(x),
    "list": lambda: [Spike.apply],
    "dict in list": lambda: [{"act": Spike.apply}],
    "tuple": lambda: (1, Spike.apply),
    "named tuple": lambda: Pair("spike", Spike.apply),
    "partial": lambda: functools.partial(with_default, act=Spike.apply),
    "partial of apply": lambda: functools.partial(Spike.apply),
    "closure": make_closure,
    "default": lambda: with_default,
    "keyword default": lambda: with_keyword,
    "global": lambda: by_global,
    "global of a global": lambda: indirect,
    "container in a global": lambda: by_table,
    "decorated": lambda: decorated,
    "object": Holder,
    "class": lambda: Holder,
}


def call(act: Any, x: Tensor) -> Tensor:
    """Find the function in whatever holds it."""
    if isinstance(act, type):
        return act.act(x)
    if isinstance(act, list | tuple):
        return call(act[-1], x)
    return call(act["act"], x) if isinstance(act, dict) else act(x)


class Net(nn.Module):
    """Weights and spikes in one module, so that no neuron module hides the function."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 6), nn.Linear(6, 2), act

    def forward(self, x: Tensor) -> Tensor:
        return self.b(call(self.act, self.a(x) - 0.1))


@pytest.mark.parametrize("place", PLACES)
def test_seen_wherever_it_is_kept(place: str) -> None:
    """One functional neuron between the two layers; afterwards every place holds what it held."""
    held = (early, table["deep"][0], with_default.__defaults__, vars(Holder)["act"])
    keyword = with_keyword.__kwdefaults__["act"]
    model = Net(PLACES[place]())
    act, x = model.act, torch.randn(5, 4)
    out = model(x)
    graph = trace(model, x)
    (neuron,) = graph.neurons.values()
    assert neuron.functional
    assert neuron.spec.class_name == "Spike"
    assert graph.layers["a"].post == graph.layers["b"].pre == (neuron.name,)
    assert graph.route == "fx"
    assert model.act is act
    assert all(
        a is b
        for a, b in zip(
            held,
            (early, table["deep"][0], with_default.__defaults__, vars(Holder)["act"]),
            strict=True,
        )
    )
    assert with_keyword.__kwdefaults__["act"] is keyword
    assert torch.equal(model(x), out)


def test_hidden_ones_are_read_operation_by_operation() -> None:
    """Where nobody finds it, the trace still runs and tells the signals."""
    graph = trace(Net(lambda x: module_like.act(x)), torch.randn(5, 4))
    (name,) = graph.neurons  # its comparison, as no surrogate is seen
    assert graph.neurons[name].spec.class_name == "gt"
    assert graph.layers["a"].calls == graph.layers["b"].calls == 1
    assert graph.layers["b"].pre == (name,)
    assert graph.layers["b"].input_signal is not None
    assert graph.layers["b"].input_signal.kind == "spike"


def test_put_back_when_the_forward_raises() -> None:
    """The class and every place are as before after an error."""

    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("on purpose")

    acts = [Spike.apply]
    kept, raw = acts[0], inspect.getattr_static(torch.autograd.Function, "apply")
    with pytest.raises(TraceError, match="on purpose"):
        trace(Fails(acts), torch.randn(2, 4))
    assert acts[0] is kept
    assert inspect.getattr_static(torch.autograd.Function, "apply") is raw


def test_a_trace_in_a_trace_and_other_threads() -> None:
    """The inner trace finds its own; another thread's calls give plain tensors and gradients."""
    seen: list[Any] = []

    def elsewhere() -> None:
        x = torch.randn(3, requires_grad=True)
        y = Spike.apply(x)
        z = early(x)
        (y + z).sum().backward()
        seen.append((type(y), type(z), x.grad is not None))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.acts = Net(Spike.apply), [Spike.apply]

        def forward(self, x: Tensor) -> Tensor:
            inner = trace(Net(self.acts), torch.randn(2, 4))
            seen.append(len(inner.neurons))
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return self.acts[0](self.net(x))

    assert len(trace(Outer(), torch.randn(2, 4)).neurons) == 2
    assert seen == [1, (Tensor, Tensor, True)]


def test_what_a_trace_leaves_behind_still_works() -> None:
    """A model that binds apply inside its forward keeps something that can be called."""
    kept: list[Any] = []

    def binds(x: Tensor) -> Tensor:
        act = Spike.apply
        kept.append(act)
        return act(x)

    assert len(trace(Net(binds), torch.randn(2, 4)).neurons) == 1
    x = torch.tensor([-1.0, 0.1], requires_grad=True)
    out = kept[-1](x)
    out.sum().backward()
    assert out.tolist() == [0.0, 1.0]
    assert x.grad is not None


def test_own_apply_of_a_function() -> None:
    """A Function that overrides apply and calls torch's is seen once, as itself."""

    class Own(Spike):
        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            return super().apply(*args, **kwargs)

    graph = trace(Net(Own.apply), torch.randn(2, 4))
    (neuron,) = graph.neurons.values()
    assert neuron.spec.class_name == "Own"


@pytest.mark.parametrize("place", ["attribute", "closure", "late", "global"])
def test_neurons_by_structure(place: str) -> None:
    """A module is a neuron where its code reaches an apply, bound early or not."""

    class Neuron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = PLACES[place]()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    assert neuron_spec(Neuron()) is not None
