# SPDX-License-Identifier: Apache-2.0
"""A trace changes nothing, whatever happens in it, and says clearly what it cannot read."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_cases import build

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.bench.nets.handwritten import FunctionalNet, ModuleNet, SequenceLIF, StatefulNet
from spikenm_fx.bench.tracing import ALLOWED_BYTES, _forward, _peak
from spikenm_fx.errors import TraceError
from spikenm_fx.trace import Limits, trace


class Nasty(nn.Module):
    """Mutates everything it can reach, and may raise at the end."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fc, self.bn, self.lif = nn.Linear(4, 4), nn.BatchNorm1d(4), SequenceLIF()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.fails = fails
        self.history: list[Tensor] = []
        self.cache: dict[str, Any] = {"deep": [torch.zeros(2)]}
        self.array = np.zeros(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.history.append(x)
        self.cache["deep"][0].add_(1)
        self.cache["new"] = x
        self.array += 1
        self.fresh = torch.rand(3)
        self.fc.weight.data.mul_(2)
        random.random()
        np.random.rand()
        x += 1
        y = self.lif(self.drop(self.fc(x)))
        if self.fails:
            raise KeyError("on purpose")
        return self.bn(y.flatten(0, 1))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = {
        f"{n}.{k}": copy.deepcopy(v)
        for n, m in model.named_modules()
        for k, v in vars(m).items()
        if not k.startswith("_")
    }
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    return {"state": state, "plain": plain, "hooks": hooks, "grads": grads, "rng": rng}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or callable(a) or (a is None and b is None)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    """Parameters, buffers, containers, flags, hooks, grads and generators are as before."""
    torch.manual_seed(0)
    model = Nasty(fails).train()
    model.lif.eval()
    x, heard = torch.rand(3, 2, 4), []
    model.fc.register_forward_hook(lambda *_: heard.append(1))
    model.fc.weight.grad = torch.ones(4, 4)
    before, given = fingerprint(model), x.clone()
    weight, grad = model.fc.weight, model.fc.weight.grad
    call, apply = nn.Module.__call__, inspect.getattr_static(torch.autograd.Function, "apply")
    act = model.lif.act
    if fails:
        with pytest.raises(TraceError, match="on purpose"):
            trace(model, x)
    else:
        graph = trace(model, x)
        assert any("hooks" in str(note) for note in graph.notes)
    assert same(before, fingerprint(model))
    assert model.fc.weight is weight
    assert weight.grad is grad
    assert torch.equal(x, given)
    assert heard == []
    assert nn.Module.__call__ is call
    assert inspect.getattr_static(torch.autograd.Function, "apply") is apply
    assert model.lif.act is act
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "name", ["spikingjelly/sew_resnet18/s", "snntorch/sequential", "hand/stateful"]
)
def test_live_state_survives(name: str) -> None:
    """Membranes left from before are ignored by the trace and still there after it."""
    case = build(name)
    other = tuple(torch.cat([x, x], dim=0) for x in case.inputs)
    out = case.model(*other)
    before = list(states(case.model))
    fresh = trace(case.model, case.inputs)
    after = list(states(case.model))
    assert before
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert fresh.route == "fx"
    for tensor in [out] if isinstance(out, Tensor) else out:
        if tensor.requires_grad:
            tensor.sum().backward(retain_graph=True)  # the user's graph is intact


def states(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        holders = (vars(module), module._buffers, vars(module).get("_memories", {}))
        for holder in holders:
            yield from (v for k, v in holder.items() if k in ("v", "mem") and isinstance(v, Tensor))


@pytest.mark.slow
def test_traces_nest_and_run_in_threads() -> None:
    """A forward that traces, and many threads at once, give what one trace gives."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner, self.lif = nn.Linear(4, 4), nn.Linear(4, 4), SequenceLIF()
            self.found = ""

        def forward(self, x: Tensor) -> Tensor:
            self.found = trace(nn.Sequential(self.inner, self.lif), torch.rand(2, 1, 4)).route
            assert self.found == "fx"
            return self.lif(self.fc(x))

    assert trace(Nested(), torch.rand(2, 1, 4)).layers["fc"].post == ("lif",)

    expected = trace(FunctionalNet(), torch.rand(4, 2, 16)).summary()
    results: list[Any] = []

    def work(build: type[nn.Module], x: Tensor, traces: bool) -> None:
        model = build()
        for _ in range(4):
            if traces:
                results.append(trace(model, x).summary())
            else:
                with torch.no_grad():
                    assert type(model(x)[0]) is Tensor

    jobs = [(FunctionalNet, torch.rand(4, 2, 16), True)] * 3
    jobs += [(FunctionalNet, torch.rand(4, 2, 16), False)] * 3
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 12


def test_inputs_and_outputs_of_every_form() -> None:
    """Several inputs, keywords, dicts, dataclass-like tuples, generators: all are followed."""
    Pair = namedtuple("Pair", "first second")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.lif = nn.Linear(4, 4), nn.Linear(4, 4), SequenceLIF()

        def forward(self, x: Tensor, extra: dict[str, Tensor], *, scale: Tensor, form: str) -> Any:
            y = self.b(self.lif(self.a(x) + extra["more"] * scale))
            if form == "generator":
                return (step for step in y)
            return {"dict": {"out": y}, "tuple": Pair(y, None), "list": [y, 3]}[form]

    x = torch.rand(3, 2, 4)
    for form in ("dict", "tuple", "list", "generator"):
        kwargs = {"scale": torch.ones(()), "form": form}
        graph = trace(Net(), (x, {"more": x}), example_kwargs=kwargs)
        assert graph.layers["b"].pre == ("lif",)
        assert graph.layers["b"].is_readout
        assert len(graph.of_kind("input")) == 3


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.rand(3, 2, 5), r"forward raised RuntimeError.*\(3, 2, 5\)"),
        ((), "TypeError"),
        (torch.rand(3, 2, 4, device="meta"), "parameters are on cpu"),
        ("text", "forward raised"),
    ],
)
def test_wrong_examples_are_explained(inputs: Any, said: str) -> None:
    """The error says what was given, what happened and where; nothing changed."""
    model = nn.Sequential(nn.Linear(4, 4), SequenceLIF())
    before = fingerprint(model)
    if inputs == ():
        assert trace(model, inputs).route == "symbolic"
        return
    with pytest.raises(TraceError, match=said):
        trace(model, inputs)
    assert same(before, fingerprint(model))


def test_unreadable_models_are_refused() -> None:
    """Scripted and lazy models, and things that are no modules, are named with a way out."""
    with pytest.raises(TraceError, match="scripted"):
        trace(torch.jit.script(nn.Linear(2, 2)), torch.rand(1, 2))
    with pytest.raises(TraceError, match="uninitialised"):
        trace(nn.Sequential(nn.LazyLinear(3)), torch.rand(1, 2))
    with pytest.raises(TraceError, match=r"nn\.Module"):
        trace(lambda x: x, torch.rand(1))  # type: ignore[arg-type]


def test_scripted_parts_are_read_and_told() -> None:
    """A scripted block inside a model: its weights are found and a note says what to do."""

    class Block(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value = nn.Linear(4, 8), nn.Linear(8, 4)

        @torch.jit.script_method
        def forward(self, x: Tensor) -> Tensor:
            return self.value(torch.relu(self.key(x)))

    model = nn.Sequential(nn.Linear(4, 4), SequenceLIF(), Block(), SequenceLIF(), nn.Linear(4, 2))
    graph = trace(model, torch.rand(3, 2, 4) * 3)
    assert graph.route == "fx+execution"
    assert set(graph.layers) == {"0", "2.key.weight", "2.value.weight", "4"}
    assert graph.layers["2.key.weight"].pre == ("1",)
    assert graph.layers["2.value.weight"].post == ("3",)
    (note,) = graph.notes
    assert note.where == "2"
    assert "PYTORCH_JIT=0" in note.text
    spikenm_fx.sparsify(model, example_inputs=torch.rand(3, 2, 4), rules=[Rule("4")])
    assert spikenm_fx.verify(spikenm_fx.fold(model)).valid


def test_meta_models() -> None:
    """A model on the meta device is traced by shapes; nothing is claimed from its values."""
    model = nn.Sequential(nn.Linear(4, 4), SequenceLIF(), nn.Linear(4, 2)).to("meta")
    graph = trace(model, torch.rand(3, 2, 4, device="meta"))
    assert graph.layers["2"].pre == ("1",)
    assert graph.layers["2"].input_shape == (3, 2, 4)


def test_limits_are_errors_that_say_so() -> None:
    """Too many operations or too long: an error with the way out, and the model as before."""
    model, x = StatefulNet(), torch.rand(4, 2, 16)
    before = fingerprint(model)
    for limits, said in ((Limits(nodes=5), "more than 5"), (Limits(seconds=0), "more than 0 s")):
        with pytest.raises(TraceError, match=said):
            trace(model, x, limits=limits)
    assert same(before, fingerprint(model))


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "data": lambda w: w.data.mul_(2),
    "in place": lambda w: w.add_(1),
    "out": lambda w: torch.add(w, 1, out=w),
    "view": lambda w: w.view(-1)[:3].fill_(7),
    "index": lambda w: w.data.__setitem__(0, 5.0),
    "foreach": lambda w: torch._foreach_mul_([w.data], 3.0),
    "numpy": lambda w: w.detach().numpy().fill(9),
    "new data": lambda w: setattr(w, "data", torch.ones(2, 2)),
    "set": lambda w: w.data.set_(torch.ones(3)),
    "half": lambda w: setattr(w, "data", w.data.half()),
    "scripted": lambda w: _scripted_write(w.data),
    "optimizer": lambda w: _step(w),
    "statistics": lambda w: F.batch_norm(torch.rand(8, 4), w.data[0], w.data[1], training=True),
    "gradient": lambda w: w.grad.zero_(),  # type: ignore[union-attr]
}


@torch.jit.script
def _scripted_write(x: Tensor) -> Tensor:
    return x.mul_(3)


def _step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.1, foreach=False).step()


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("fails", [False, True])
def test_whatever_writes_into_a_parameter_is_undone(name: str, fails: bool) -> None:
    """Parameters are copied when they are written into, and every way of writing is noticed."""

    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif, self.other = nn.Linear(4, 4), SequenceLIF(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.other(self.lif(self.fc(x)))
            WRITES[name](self.fc.weight)
            if fails:
                raise KeyError("on purpose")
            return y

    model = Writer()
    weight = model.fc.weight
    weight.grad = torch.full((4, 4), 2.0)
    grad, kept, place = weight.grad, weight.detach().clone(), weight.data_ptr()
    with contextlib.suppress(TraceError) if fails else contextlib.nullcontext():
        trace(model, torch.rand(3, 2, 4))
    assert model.fc.weight is weight
    assert weight.data_ptr() == place
    assert weight.dtype is torch.float32
    assert torch.equal(weight, kept)
    assert weight.grad is grad
    assert torch.equal(grad, torch.full((4, 4), 2.0))


def test_parameters_are_not_copied() -> None:
    """A trace of a model of 16 MiB of weights takes no such memory."""
    model = nn.Sequential(nn.Linear(2048, 2048), SequenceLIF(), nn.Linear(2048, 4))
    x = torch.rand(2, 1, 2048)
    assert _peak(lambda: trace(model, x)) < 2**20


MEASURED = (
    *("spikingjelly/sew_resnet18/m", "braincog/resnet18/m", "snntorch/rleaky", "norse/recurrent"),
    *("sinabs/recurrent", "rockpool/lif", "hand/stateful", "hand/raw", "hand/scripted"),
)


@pytest.mark.parametrize("name", MEASURED)
def test_memory_is_bounded(name: str) -> None:
    """At most twice what a forward takes, and 16 KiB, which only tiny models feel."""
    case = build(name, whole=True)
    # the first trace imports what traces need
    trace(nn.Sequential(nn.Linear(2, 2), SequenceLIF()), torch.rand(2, 1, 2))
    forward = _peak(lambda: _forward(case))
    assert forward > 0
    assert _peak(lambda: trace(case.model, case.inputs)) <= 2 * forward + ALLOWED_BYTES


def test_no_memory_is_kept() -> None:
    """The example's values are not held by the graph."""
    graph = trace(ModuleNet(), torch.rand(4, 2, 2, 8, 8))
    held = [
        value
        for node in graph.operations.nodes
        for value in node.meta.values()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() > 99
    ]
    assert held == []


def test_neurons_of_other_models_are_not_copied() -> None:
    """Of all that snnTorch has on its list, those of others are kept by reference."""
    snntorch = pytest.importorskip("snntorch")
    case = build("snntorch/rleaky", whole=True)
    other = snntorch.Leaky(beta=0.5, init_hidden=True)
    other(torch.rand(1, 2**20))
    before = other.mem.clone()
    trace(nn.Sequential(nn.Linear(2, 2), SequenceLIF()), torch.rand(2, 1, 2))
    assert _peak(lambda: trace(case.model, case.inputs)) < 2**20
    assert torch.equal(other.mem, before)
