# SPDX-License-Identifier: Apache-2.0
"""A program computes what its model does, whatever the sizes, the splits and the threads."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from few_rounds import few_rounds, hurried
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from program_strategies import Example, RuleNeuron, examples
from torch import Tensor, nn

from spikenm_fx.errors import PackError, SpikeNMWarning
from spikenm_fx.pack import native_status, pack, pack_weight, packing, unpack_weight
from spikenm_fx.program import Engine
from spikenm_fx.program.check import compared
from spikenm_fx.program.image import image_of
from spikenm_fx.program.lower import lower
from spikenm_fx.trace import NeuronSpec, register_neuron, trace

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds"]

LIF = NeuronSpec("test", "RuleNeuron", "lif", True, decay=0.9, threshold=0.7, time_axis=0)
STEP = NeuronSpec("test", "RuleNeuron", "lif", True, decay=0.9, threshold=0.7)


def program(model: nn.Module, x: Tensor, **kwargs: Any) -> Engine:
    """The program of a model; fails where it has none."""
    with hurried(), warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = pack(model, x, program=True, **kwargs)
    assert isinstance(engine, Engine)
    return engine


def sequence(spec: NeuronSpec = LIF) -> nn.Module:
    """A small network over time."""
    torch.manual_seed(0)
    layers = (nn.Linear(20, 30), RuleNeuron(spec), nn.Linear(30, 30), RuleNeuron(spec))
    return nn.Sequential(*layers, nn.Linear(30, 4)).eval()


def reset(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, RuleNeuron):
            module.reset()


@tries(40)
@given(examples())
def test_a_random_network_and_its_program_agree(example: Example) -> None:
    """``pack`` compares them neuron by neuron, and refuses a program that differs."""
    with torch.no_grad():
        engine = program(example.model, example.x)
        assert packing(engine).proof is not None
        reset(example.model)
        assert engine(example.x).shape == example.model(example.x).shape


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_one_wrong_output_of_any_layer_is_seen(layer: str) -> None:
    """The comparison that ``pack`` makes tells a program of other weights from the model."""
    model, x = sequence(), torch.rand(5, 2, 20)
    lowered = lower(model, trace(model, x))
    assert compared(model, Engine(image_of(lowered)), lowered, x).disagreement == ""
    lowered.packed[layer].values[1] += 1.0  # of one output: some of its inputs spike
    assert compared(model, Engine(image_of(lowered)), lowered, x).disagreement


@tries(15)
@given(examples(), st.data())
def test_any_split_of_a_sequence_gives_the_same(example: Example, data: st.DataObject) -> None:
    """One call, calls on parts, and single steps end in the same outputs, bit for bit."""
    if not example.multi or example.model.parts.averages:
        return
    engine, x = program(example.model, example.x), example.x
    whole = engine(x)
    engine.reset()
    cut = data.draw(st.integers(1, x.shape[0]))
    parts = [engine(x[:cut]), *([engine(x[cut:])] if cut < x.shape[0] else [])]
    assert torch.equal(torch.cat(parts), whole)
    engine.reset()
    assert torch.equal(torch.stack([engine.step(frame) for frame in x]), whole)


@tries(15)
@given(examples(), st.integers(1, 4))
def test_another_batch_is_replanned(example: Example, times: int) -> None:
    """Each sample of a larger batch gives what it gives alone, on any number of threads."""
    engine, axis = program(example.model, example.x), int(example.multi)
    alone = engine(example.x)
    engine.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(times)
    try:
        many = engine(torch.cat([example.x] * times, dim=axis))
    finally:
        torch.set_num_threads(threads)
    out = 0 if not example.multi or example.model.parts.averages else 1
    for part in many.chunk(times, dim=out):
        assert torch.equal(part, alone)


@tries(10)
@given(examples())
def test_all_isa_levels_agree(example: Example) -> None:
    """The vector width changes nothing where values are spikes; floats differ by rounding."""
    engine = program(example.model, example.x)
    for level in range(4):
        engine.reset()
        if engine._net.level(level):
            assert engine(example.x).isfinite().all()


def test_the_program_is_deterministic_over_threads() -> None:
    """A wide layer is shared out among threads, and gives the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 2048), RuleNeuron(STEP), nn.Linear(2048, 64)).eval()
    x = (torch.rand(1, 2048) < 0.3).float()
    engine, found = program(model, x), []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        engine.reset()
        found.append(engine(x))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_two_engines_in_two_threads_do_not_disturb_each_other() -> None:
    """Each has its states and its memory."""
    x = torch.rand(5, 2, 20)
    first = program(sequence(), x)
    second, alone = copy.deepcopy(first), first(x)
    first.reset()
    wrong: list[int] = []

    def work(engine: Engine) -> None:
        for _ in range(200):
            engine.reset()
            if not torch.equal(engine(x), alone):
                wrong.append(1)

    workers = [threading.Thread(target=work, args=(e,)) for e in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_call_allocates_nothing_but_its_outputs() -> None:
    """What an engine keeps does not grow with calls, only with new sizes."""
    x = torch.rand(5, 2, 20)
    engine = program(sequence(), x)
    engine(x)
    before = engine.resident_bytes
    for _ in range(10):
        engine(x)
    assert engine.resident_bytes == before
    engine.reset()
    engine(torch.rand(50, 20, 20))
    assert engine.resident_bytes > before


def test_nan_reaches_what_depends_on_it_and_nothing_else() -> None:
    """As in torch: a NaN in one sample leaves the other samples as they are."""
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), RuleNeuron(STEP), nn.Conv2d(5, 3, 1))
    linear = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1))
    x = torch.rand(2, 2, 5, 5)
    engine, plain = program(model.eval(), x), program(linear.eval(), x)
    clean = engine(x)
    x[1, 0, 2, 2] = float("nan")
    engine.reset()
    assert torch.equal(engine(x)[0], clean[0])
    with torch.no_grad():
        assert torch.equal(plain(x).isnan(), linear(x).isnan())


def test_an_empty_batch_gives_empty_outputs() -> None:
    """Of the right shape."""
    x = torch.rand(5, 2, 20)
    engine = program(sequence(), x)
    assert engine(x[:, :0]).shape == (5, 0, 4)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((5, 2, 21), "axis 2 of the input has size 21; the network was made for 20"),
        ((5, 20), "has 2 axes; 3 are required"),
        ((0, 2, 20), "no time steps"),
    ],
)
def test_other_sizes_are_refused_by_name(shape: tuple[int, ...], said: str) -> None:
    """And the engine runs on as before."""
    x = torch.rand(5, 2, 20)
    engine = program(sequence(), x)
    with pytest.raises(PackError, match=said):
        engine(torch.rand(shape))
    assert engine(x).shape == (5, 2, 4)


def test_state_of_another_batch_is_refused_until_reset() -> None:
    """A stream's state belongs to its batch."""
    x = torch.rand(5, 2, 20)
    engine = program(sequence(), x)
    engine(x)
    with pytest.raises(PackError, match="state of 2 streams and are given 3"):
        engine(torch.rand(5, 3, 20))
    engine.reset()
    assert engine(torch.rand(5, 3, 20)).shape == (5, 3, 4)


@pytest.mark.parametrize("bad", [torch.rand(5, 2, 20).double(), "x", None])
def test_what_is_no_float_tensor_is_refused(bad: Any) -> None:
    """By what it is."""
    engine = program(sequence(), torch.rand(5, 2, 20))
    with pytest.raises(PackError, match="takes a float32 tensor on the CPU"):
        engine(bad)


def test_reset_puts_every_neuron_to_rest() -> None:
    """The same input gives the same again; without it the stream goes on."""
    x = torch.rand(5, 2, 20)
    engine = program(sequence(), x)
    first, second = engine(x), engine(x)
    engine.reset()
    assert torch.equal(engine(x), first)
    assert not torch.equal(first, second)


class Loop(nn.Module):
    """Steps through time in its own forward, and adds up its spikes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 5)
        self.n1, self.n2 = RuleNeuron(STEP), RuleNeuron(STEP)

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        seen: list[Tensor] = []
        for t in range(4 if self.how == "constant" else x.shape[0]):
            frame = x if self.how == "constant" else x[t]
            out = self.n2(self.fc2(self.n1(self.fc1(frame))))
            total = total + out
            seen.append(out)
        if self.how == "last":
            return seen[-1]
        mean: Tensor = total / len(seen)
        return torch.stack(seen) if self.how == "stack" else mean


class Scaled(nn.Module):
    """Computes with the number of steps, or of samples, as a number of its own."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.body = axis, sequence()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y * x.shape[self.axis]


@pytest.mark.parametrize(("axis", "said"), [(0, "6 time steps"), (1, "3 samples")])
def test_a_size_that_is_a_number_in_the_model_stays_what_it_was(axis: int, said: str) -> None:
    """A program would compute with the example's: other sizes are refused."""
    x = torch.rand(5, 2, 20)
    engine = program(Scaled(axis).eval(), x)
    assert engine(x).shape == (5, 2, 4)
    engine.reset()
    with pytest.raises(PackError, match=said):
        engine(torch.rand(6, 2, 20) if axis == 0 else torch.rand(5, 3, 20))


@pytest.mark.parametrize("how", ["sum", "stack", "last", "constant"])
def test_a_loop_over_time_is_rolled_up(how: str) -> None:
    """One operation per layer, however many steps; other lengths run too."""
    torch.manual_seed(1)
    model = Loop(how).eval()
    x = 2 * torch.rand(*(() if how == "constant" else (4,)), 3, 12)
    engine = program(model, x)
    assert len([op for op in engine.operations if op.startswith("neuron")]) == 2
    with torch.no_grad():
        reset(model)
        assert torch.equal(engine(x), model(x))
        if how != "constant":
            longer = 2 * torch.rand(9, 3, 12)
            engine.reset()
            reset(model)
            torch.testing.assert_close(engine(longer), model(longer))


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


class CodeNeuron(nn.Module):
    """Spikes by a comparison in its forward, with a number of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.mem: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        currents: Tensor = self.fc(x)
        return (currents > currents.amax()).float()


class Secret(RuleNeuron):
    """A neuron of which only a part is known."""


def _partly(module: Any) -> NeuronSpec:
    spec: NeuronSpec = module.spec
    return replace(spec, exact=False)


register_neuron(Secret, read=_partly)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(8, 8), Sorted()), "sort in 1"),
        (nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8)), "a GroupNorm has no operation"),
        (nn.Sequential(nn.Linear(8, 8), nn.Softplus()), "1: a Softplus has no operation"),
        (nn.Sequential(nn.Linear(8, 8), Secret(STEP)), "1: the update rule of test"),
        (nn.Sequential(CodeNeuron()), "in 0: "),
    ],
)
def test_what_has_no_operation_is_refused_by_name(model: nn.Module, said: str) -> None:
    """The engine is then the one of ``pack`` without a program, and both messages name the part."""
    x = torch.rand(2, 8)
    with pytest.warns(SpikeNMWarning, match="There is no program of this network"):
        engine = pack(model.eval(), x, program=True)
    assert not isinstance(engine, Engine)
    assert said in packing(engine).note
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x))


class Nothing(nn.Module):
    """Not one of its operations has a program; it counts its calls, and its norm has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(8), 0
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += x.sum(0)  # type: ignore[operator]
        y: Tensor = self.norm(x.softmax(-1).cumsum(0))
        return y


@pytest.mark.parametrize("model", [Nothing(), sequence()])
def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    """Whether or not there is a program: tensors, states, modes and random numbers."""
    x = torch.rand(2, 8) if isinstance(model, Nothing) else torch.rand(5, 2, 20)
    with torch.no_grad():
        model.train()(x)  # in the middle of something
    held = [m for m in model.modules() if isinstance(m, RuleNeuron)]
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    states, given, random = [m.v for m in held], x.clone(), torch.get_rng_state()
    calls = getattr(model, "calls", 0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine = pack(model, x, program=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [m.v for m in held] == states
    assert getattr(model, "calls", 0) == calls
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(engine, Engine) != isinstance(model, Nothing)
    if isinstance(model, Nothing):
        assert "There is no program of this network" in str(said[-1].message)
        assert "sum in the forward" in str(said[-1].message)
        assert not any(part.reason == "" for part in packing(engine).parts)


def test_the_example_shape_is_that_of_the_examples() -> None:
    """Also of an engine that was loaded, and after calls of other sizes."""
    engine = program(sequence(), torch.rand(5, 2, 20))
    assert engine.example_shape == (5, 2, 20)
    engine(torch.rand(7, 3, 20))
    assert engine.example_shape == (5, 2, 20)
    assert copy.deepcopy(engine).example_shape == (5, 2, 20)


def test_a_program_needs_examples() -> None:
    """Without them nothing is known of the network."""
    with pytest.raises(PackError, match="example inputs"):
        pack(sequence(), program=True)


def test_int8_weights_run_as_they_are_stored() -> None:
    """The program of rounded weights is that of a model with these weights."""
    model, x = sequence(), torch.rand(5, 2, 20)
    engine = program(model, x, dtype=torch.int8)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            stored = pack_weight(layer.weight, "1:1", dtype=torch.int8)
            layer.weight.data.copy_(unpack_weight(stored))
    reset(model)
    exact = program(model, x)
    assert torch.equal(engine(x), exact(x))
