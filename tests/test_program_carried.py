# SPDX-License-Identifier: Apache-2.0
"""Networks whose steps read what the step before made, and networks of several inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_rounds import few_rounds
from program_strategies import RuleNeuron
from test_program import LIF, program, reset
from test_program_runtime import numbers, runner
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import PackError, SpikeNMWarning
from spikenm_fx.pack import native_status, pack, packing
from spikenm_fx.program import Engine
from spikenm_fx.state import reset_to_rest

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds", "runner"]

T, B, INPUTS, WIDTH = 7, 2, 10, 16


def strong(*layers: Any) -> None:
    for layer in layers:
        layer.weight.data.mul_(4)


class Feedback(nn.Module):
    """snnTorch's recurrent neurons, their states in the caller's hands or their own."""

    def __init__(self, kind: str, *, hidden: bool) -> None:
        super().__init__()
        snn = pytest.importorskip("snntorch")
        self.first, self.last, self.kind = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 4), kind
        strong(self.first)
        made = {
            "leaky": lambda: snn.RLeaky(0.9, linear_features=WIDTH, init_hidden=hidden),
            "one": lambda: snn.RLeaky(0.9, V=0.5, all_to_all=False, init_hidden=hidden),
            "synaptic": lambda: snn.RSynaptic(0.8, 0.9, linear_features=WIDTH, init_hidden=hidden),
        }
        self.neuron, self.hidden = made[kind](), hidden

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if self.hidden:
            out = self.last(self.neuron(self.first(x)))
            return out
        state: Any = self.neuron.reset_mem()
        seen = []
        for frame in x:
            spikes, *rest = self.neuron(self.first(frame), *state)
            state = (spikes, *rest)
            seen.append(self.last(spikes))
        return torch.stack(seen)


def container(kind: str, mode: str) -> nn.Module:
    """SpikingJelly's containers, which hand a neuron its own spikes."""
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    fire = neuron.LIFNode(v_threshold=0.4)
    held = (
        layer.LinearRecurrentContainer(fire, WIDTH, WIDTH)
        if kind == "linear"
        else layer.ElementWiseRecurrentContainer(fire, lambda x, y: 0.5 * x + y)
    )
    body = nn.Sequential(layer.Linear(INPUTS, WIDTH), held, layer.Linear(WIDTH, 4))
    functional.set_step_mode(body, mode)
    fire.step_mode = "s"
    strong(body[0])
    if kind == "linear":
        strong(held.rc)
    return body


class Cells(nn.Module):
    """Norse's cells with weights of their own in a loop."""

    def __init__(self) -> None:
        super().__init__()
        norse = pytest.importorskip("norse.torch")
        self.cell, self.read = norse.LIFRecurrentCell(INPUTS, WIDTH), norse.LILinearCell(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = last = None
        seen = []
        for frame in x:
            spikes, first = self.cell(10 * frame, first)
            out, last = self.read(spikes, last)
            seen.append(out)
        return torch.stack(seen)


class Step(torch.autograd.Function):
    """A user's own surrogate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).float()


class Code(nn.Module):
    """Neurons as code of a forward, each written otherwise."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 4)
        self.back, self.beta = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.8))
        strong(self.first)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self, self.how)(x)
        return found

    def plain(self, x: Tensor) -> Tensor:
        v: Any = 0
        seen = []
        for frame in x:
            v = 0.9 * v + self.first(frame)
            spikes = (v >= 1).float()
            v = v * (1 - spikes)
            seen.append(self.last(spikes))
        return torch.stack(seen)

    def subtract(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], WIDTH)
        seen = []
        for frame in x:
            v = self.beta * v + (1 - self.beta) * self.first(frame)
            soft = torch.sigmoid(4 * (v - 0.5))
            spikes = (v > 0.5).float() + soft - soft.detach()
            v = torch.where(v > 0.5, v - 0.5, v)
            seen.append(self.last(spikes))
        return torch.stack(seen).mean(0)

    def adaptive(self, x: Tensor) -> Tensor:
        """Its threshold rises with its spikes, which are fed back; the readout integrates."""
        v = torch.zeros(x.shape[1], WIDTH)
        spikes, rise = torch.zeros_like(v), torch.zeros_like(v)
        out = torch.zeros(x.shape[1], 4)
        for frame in x:
            rise = 0.97 * rise + 0.3 * spikes
            v = self.beta * v + self.first(frame) + self.back(spikes) - spikes
            spikes = Step.apply(v - 0.3 - rise)  # type: ignore[no-untyped-call]
            out = 0.8 * out + self.last(spikes)
        return out


class Kept(nn.Module):
    """A neuron as code that keeps its membrane as an attribute: one call is one step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 4)
        self.v: Any = None
        strong(self.first)

    def reset(self) -> None:
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        drive = self.first(x)
        v = drive if self.v is None else 0.9 * self.v + drive
        spikes = (v >= 1).float()
        self.v = v - spikes
        out: Tensor = self.last(spikes)
        return out


def norse(name: str) -> Any:
    torch_of = pytest.importorskip("norse.torch")
    if name == "LILinearCell":
        read = torch_of.LILinearCell(WIDTH, 4)
        body = torch_of.SequentialState(nn.Linear(INPUTS, WIDTH), torch_of.LIFCell(), read)
        body[0].weight.data.mul_(40)
        return body
    cell = getattr(torch_of, name)(INPUTS, WIDTH)
    cell.input_weights.data.mul_(10)
    return torch_of.SequentialState(cell, nn.Linear(WIDTH, 4))


OVER_TIME: dict[str, Callable[[], nn.Module]] = {
    **{f"snntorch {k}": partial(Feedback, k, hidden=False) for k in ("leaky", "one", "synaptic")},
    **{f"spikingjelly {k}": partial(container, k, "m") for k in ("linear", "element-wise")},
    "norse LIFRecurrent": lambda: norse("LIFRecurrent"),
    "norse cells": Cells,
    **{f"code, {k}": partial(Code, k) for k in ("plain", "subtract", "adaptive")},
}
PER_STEP: dict[str, Callable[[], nn.Module]] = {
    **{f"snntorch {k}": partial(Feedback, k, hidden=True) for k in ("leaky", "one", "synaptic")},
    **{f"spikingjelly {k}": partial(container, k, "s") for k in ("linear", "element-wise")},
    "norse LIFRecurrentCell": lambda: norse("LIFRecurrentCell"),
    "norse LILinearCell": lambda: norse("LILinearCell"),
    "code": Kept,
}


def tensor(given: Any) -> Tensor:
    """What is no state."""
    found: Tensor = given[0] if isinstance(given, tuple) else given
    return found


def rest(model: nn.Module) -> None:
    """As each framework does it."""
    reset_to_rest(model)
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "reset_mem"):
            module.reset_mem()


@pytest.mark.parametrize("name", OVER_TIME)
def test_what_steps_carry_runs_natively(name: str, tmp_path: Path) -> None:
    """Of any length and batch; saved and loaded it gives the same bits."""
    torch.manual_seed(0)
    model = OVER_TIME[name]().eval()
    x = 2 * torch.rand(T, B, INPUTS)
    engine = program(model, x)
    assert packing(engine).proof is not None
    assert any(op.startswith("recall") for op in engine.operations)
    engine.save(tmp_path / "net.snm")
    loaded = spikenm_fx.load_engine(tmp_path / "net.snm")
    with torch.no_grad():
        for given in (x, 2 * torch.rand(T + 12, B + 1, INPUTS), x[:1]):
            engine.reset()
            loaded.reset()
            rest(model)
            found = tensor(engine(given))
            assert found.abs().max() > 0
            torch.testing.assert_close(found, tensor(model(given)), rtol=1e-4, atol=1e-4)
            assert torch.equal(tensor(loaded(given)), found)


@pytest.mark.parametrize("name", OVER_TIME)
def test_what_steps_carry_goes_on_from_step_to_step(name: str) -> None:
    """One call, and single steps: the same outputs, bit for bit."""
    torch.manual_seed(0)
    x = 2 * torch.rand(T, B, INPUTS)
    engine = program(OVER_TIME[name]().eval(), x)
    whole = tensor(engine(x))
    engine.reset()
    steps = torch.stack([tensor(engine.step(frame)) for frame in x])
    if whole.dim() == 3:
        assert torch.equal(steps, whole)
    elif name.endswith("subtract"):
        torch.testing.assert_close(steps.mean(0), whole)
    else:
        assert torch.equal(steps[-1], whole)


@pytest.mark.parametrize("name", PER_STEP)
def test_states_of_single_steps_are_kept(name: str) -> None:
    """Call after call as the model, which keeps them or starts at rest; steps always go on."""
    torch.manual_seed(0)
    model, x = PER_STEP[name]().eval(), 2 * torch.rand(T, B, INPUTS)
    engine = program(model, x[0])
    with torch.no_grad():
        rest(model)
        for frame in x:
            found = tensor(engine(frame))
            torch.testing.assert_close(found, tensor(model(frame)), rtol=1e-4, atol=1e-4)
        engine.reset()
        first = [tensor(engine.step(frame)) for frame in x]
        assert torch.stack(first).abs().max() > 0
        engine.reset()
        assert all(torch.equal(tensor(engine.step(f)), y) for f, y in zip(x, first, strict=True))


def test_a_split_sequence_ends_where_the_whole_does() -> None:
    """A network that keeps its states from call to call, cut anywhere."""
    torch.manual_seed(0)
    x = 2 * torch.rand(T, B, INPUTS)
    engine = program(container("linear", "m").eval(), x)
    whole = engine(x)
    for cut in (1, 3, T - 1):
        engine.reset()
        assert torch.equal(torch.cat([engine(x[:cut]), engine(x[cut:])]), whole)


def test_int8_weights_of_a_loop() -> None:
    """What the loop carries is found on the exact weights; rounded ones run."""
    torch.manual_seed(0)
    x = 2 * torch.rand(B, INPUTS)
    engine = program(Kept().eval(), x, dtype=torch.int8)
    first = engine(x)
    assert any(not torch.equal(engine(x), first) for _ in range(5))


class TwoSources(nn.Module):
    """Two inputs over time, and one that is the same in all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(INPUTS, 12), nn.Linear(6, 12), nn.Linear(3, 12)
        self.fire, self.head = RuleNeuron(LIF), nn.Linear(24, 5)

    def forward(self, x: Tensor, y: Tensor, context: Tensor) -> Tensor:
        spikes = self.fire(self.a(x) + self.b(y) + self.c(context))
        found: Tensor = self.head(torch.cat([spikes, self.b(y)], dim=-1))
        return torch.log_softmax(found, dim=-1)


def sources(steps: int = T, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.rand(steps, batch, INPUTS),
        torch.rand(steps, batch, 6),
        2 * torch.rand(batch, 3),
    )


def two_sources() -> tuple[TwoSources, Engine, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model, x = TwoSources().eval(), sources()
    return model, program(model, x), x  # type: ignore[arg-type]


def test_several_inputs_run_natively() -> None:
    """By place or by name, of other lengths and batches, whole or step by step."""
    model, engine, _ = two_sources()
    assert engine.example_shapes == ((T, B, INPUTS), (T, B, 6), (B, 3))
    with torch.no_grad():
        for x in (sources(), sources(T + 3, B + 2)):
            engine.reset()
            reset(model)
            found = engine(*x)
            torch.testing.assert_close(found, model(*x))
            engine.reset()
            assert torch.equal(engine(x[0], context=x[2], y=x[1]), found)
            engine.reset()
            steps = [engine.step(a, b, x[2]) for a, b in zip(x[0], x[1], strict=True)]
            assert torch.equal(torch.stack(steps), found)


def test_examples_may_be_given_by_name() -> None:
    """As a mapping, which must fit the forward."""
    model, engine, x = two_sources()
    again = program(model, {"y": x[1], "context": x[2], "x": x[0]})  # type: ignore[arg-type]
    engine.reset()
    assert torch.equal(again(*x), engine(*x))
    with pytest.raises(PackError, match="takes no such inputs"):
        pack(model, {"z": x[0]}, program=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:2], "given 2 inputs; it takes x, y, context"),
        (lambda x: (x[0], x[1][:-1], x[2]), "input 2 has 6 time steps, and those before it 7"),
        (lambda x: (x[0], x[1], x[2][:1]), "input 3 has a batch of 1"),
        (lambda x: (x[0], x[1].double(), x[2]), "takes a float32 tensor"),
        (lambda x: (x[0], x[1][..., :5], x[2]), "has size 5; the network was made for 6"),
    ],
)
def test_inputs_that_do_not_fit_each_other_are_refused(
    change: Callable[[Any], tuple[Tensor, ...]], said: str
) -> None:
    """By name, and the engine runs on."""
    _, engine, x = two_sources()
    with pytest.raises(PackError, match=said):
        engine(*change(x))
    with pytest.raises(PackError, match="it takes x, y, context, each once"):
        engine(*x, x=x[0])
    assert engine(*x).shape == (T, B, 5)


@pytest.mark.slow
def test_several_inputs_from_a_file(runner: Path, tmp_path: Path) -> None:
    """In a fresh process, by ``spikenm-run``, whole and as a stream: the same bits."""
    _, engine, x = two_sources()
    engine.save(tmp_path / "net.snm")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import torch, spikenm_fx\n"
        "engine = spikenm_fx.load_engine('net.snm')\n"
        "torch.save(engine(*torch.load('x.pt')), 'y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = engine(*x)
    assert torch.equal(torch.load(tmp_path / "y.pt"), found)
    files = [tmp_path / f"{at}.npy" for at in range(3)]
    for file, each in zip(files, x, strict=True):
        np.save(file, each.numpy())
    command = [runner, tmp_path / "net.snm"]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=True)
    assert torch.equal(numbers(done.stdout), found.flatten(0, 1))
    engine.reset()
    one = [[a[:1], b[:1], x[2][:1]] for a, b in zip(x[0], x[1], strict=True)]
    stream = b"".join(each.numpy().tobytes() for step in one for each in step)
    streamed = subprocess.run(command, input=stream, capture_output=True, check=True)
    expected = torch.cat([engine.step(*step) for step in one])
    assert torch.equal(numbers(streamed.stdout.decode()), expected)
    short = subprocess.run([*command, files[0]], capture_output=True, text=True)
    assert short.returncode == 1
    assert "it is given 1 inputs; the network takes 3" in short.stderr


class Growing(nn.Module):
    """What its loop carries has another shape than what it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[1], 1)
        for frame in x:
            y = self.first(frame)
            total = total * (y > 0).float().mean(-1, keepdim=True) + y.sum(-1, keepdim=True)
        return total.cumsum(0)


def test_what_a_loop_carries_and_has_no_operation_is_named() -> None:
    """The engine is then the one without a program."""
    x = torch.rand(T, B, INPUTS)
    with pytest.warns(SpikeNMWarning, match="There is no program of this network"):
        engine = pack(Growing().eval(), x, program=True)
    assert not isinstance(engine, Engine)
    assert "cumsum in the forward" in packing(engine).note


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": nn.Tanh(),
    "gelu": nn.functional.gelu,
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "exp": torch.exp,
    "softmax": nn.Softmax(dim=-1),
    "softmax of pixels": lambda y: y.softmax(2),
    "logarithm": lambda y: y.log_softmax(1),
}


class Between(nn.Module):
    """A function between a convolution and a linear layer, over images."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Linear(72, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.function(4 * self.conv(x)).flatten(1))
        return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_number_and_softmax(name: str) -> None:
    """On images, between layers, as torch computes them."""
    torch.manual_seed(0)
    model, x = Between(FUNCTIONS[name]).eval(), torch.randn(B, 2, 5, 6)
    engine = program(model, x)
    with torch.no_grad():
        for y in (x, torch.cat([x, 9 * x])):
            torch.testing.assert_close(engine(y), model(y), rtol=1e-4, atol=1e-5)
        broken = x.clone()
        broken[0, 0, 2, 2] = float("nan")
        assert torch.equal(engine(broken).isnan(), model(broken).isnan())
