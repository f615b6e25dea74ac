# SPDX-License-Identifier: Apache-2.0
"""Long sequences: what a trace tells does not depend on how many steps the loop over time has."""

import sys
import types

import pytest
import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.trace import SpikingGraph, trace
from spikenm_fx.trace.channels.groups import coupled_groups


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Recurrent(nn.Module):
    """Adaptive neurons with a recurrent weight, written out; ``x`` is [B, T, C]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.W, self.V = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)
        self.alpha = nn.Parameter(torch.rand(outputs))

    def forward(self, x: Tensor) -> Tensor:
        u = w = s = torch.zeros(x.shape[0], len(self.alpha))
        out, x = [], self.W(x)
        for t in range(x.shape[1]):
            a = self.alpha.clamp(0.5, 0.95)
            w = 0.9 * w + 0.1 * u + 0.5 * s
            u = a * (u - s) + (1 - a) * (x[:, t] + self.V(s) - w)
            s = Fire.apply(u - 0.1)
            out.append(s)
        return torch.stack(out, 1)


class Written(nn.Module):
    """States in one stacked tensor by layer, parts by iteration, outputs written into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
        self.readout = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(3, x.shape[0], 16)
        out = torch.zeros(x.shape[0], x.shape[1], 4)
        for t, part in enumerate(x.unbind(1)):
            new = []
            for i, layer in enumerate(self.layers):
                v = 0.5 * state[i] + layer(part)
                part = (v > 0.1).float()
                new.append(v * (1 - part))
            state = torch.stack(new)
            out[:, t] = self.readout(part)
        return out


class Deep(nn.Module):
    """As many blocks as others have time steps, each with a weight of its own."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.stacked = nn.Parameter(torch.randn(depth, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(x + (block(x) > 0).float())
        for i in range(len(self.stacked)):
            x = torch.tanh(x @ self.stacked[i])
        return x


class Lifted(nn.Module):
    """A layer that is given the entries of the first axis one by one, as Norse's ``Lift`` does."""

    def __init__(self, layer: nn.Module, take: str) -> None:
        super().__init__()
        self.layer, self.take = layer, take

    def forward(self, x: Tensor) -> Tensor:
        if self.take == "iteration":
            return torch.stack([self.layer(part) for part in x])
        return torch.stack([self.layer(x[t]) for t in range(x.shape[0])])


class Fires(nn.Module):
    """Neurons over the first axis of ``[T, B, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v / 2 + x[t]
            s = Fire.apply(v - 0.5)
            v = v * (1 - s)
            out.append(s)
        return torch.stack(out)


def told(graph: SpikingGraph) -> dict[str, object]:
    """What a trace says of layers, neurons and edges, apart from lengths and numbers of calls."""
    layers = {
        r.name: (r.pre, r.post, r.feeds, r.input_signal, r.is_head, r.is_readout, r.undecided)
        for r in graph.layers.values()
    }
    # a spec holds functions made anew by each trace
    neurons = {n.name: (n.layers, n.output, n.spec.class_name) for n in graph.neurons.values()}
    return {"layers": layers, "neurons": neurons, "notes": graph.notes, "route": graph.route}


def coupled(graph: SpikingGraph) -> list[object]:
    """Which tensors' channels go together, and whether they may be permuted."""
    groups = coupled_groups(graph)
    return sorted((g.size, sorted(map(str, set(g.members))), bool(g.frozen)) for g in groups)


def recurrent() -> nn.Module:
    return nn.Sequential(Recurrent(12, 16), Recurrent(16, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("build", [recurrent, Written])
def test_many_steps_tell_what_few_steps_tell(build) -> None:
    """Layers, pairs, signals and notes of 60 steps are those of 6, and calls count all 60."""
    torch.manual_seed(0)
    model = build()
    width = 12 if build is recurrent else 16
    x = 3 * torch.rand(2, 60, width)
    few, many = trace(model, x[:, :6]), trace(model, x)
    assert told(many) == told(few)
    loops = {name for name, r in few.layers.items() if r.calls == 6}
    assert loops
    assert {many.layers[name].calls for name in loops} == {60}


@pytest.mark.parametrize("build", [recurrent, Written])
def test_what_is_recorded_does_not_grow_with_the_steps(build) -> None:
    """All steps beyond the first few stand for recorded ones."""
    model, width = build(), 12 if build is recurrent else 16
    sizes = [
        sum(n.op != "get_attr" and "getitem" not in n.name for n in graph.nodes)
        for steps in (40, 80)
        if (graph := trace(model, torch.rand(2, steps, width)).operations) is not None
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("take", ["index", "iteration"])
def test_layers_without_state_are_lifted_over_time(take: str) -> None:
    """A loop along the first axis, of the input or of stacked steps, is one over time."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(Lifted(nn.Linear(12, 16), take), Fires(), Lifted(nn.Linear(16, 16), take), Fires()),
        Lifted(nn.Linear(16, 4), take),
    )
    x = 3 * torch.rand(80, 2, 12)
    few, middle, many = (trace(model, x[:steps]) for steps in (6, 40, 80))
    assert told(many) == told(few)
    assert coupled(many) == coupled(few)
    assert {r.calls for r in many.layers.values()} == {80}
    counts = []
    for graph in (middle, many):
        assert graph.operations is not None
        made = (n for n in graph.operations.nodes if n.op != "get_attr" and "getitem" not in n.name)
        counts.append(len([n for n in made if "unbind" not in n.name]))
    assert counts[0] == counts[1]


def test_heads_are_no_steps() -> None:
    """Parts of channels that come to lie along the first axis are recorded one by one."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.each, self.out = nn.Linear(8, 48), nn.Linear(4, 4), nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.q(x).view(12, 12, 4).permute(1, 0, 2)
            return self.out(torch.cat([self.each(heads[h]) for h in range(12)], -1))

    graph = trace(Heads(), torch.rand(12, 8))
    assert graph.operations is not None
    called = [n for n in graph.operations.nodes if n.target == "each"]
    assert len(called) == 12


def test_depth_is_no_loop_over_time() -> None:
    """Thirty blocks with weights of their own stay thirty, each fed by the one before."""
    graph = trace(Deep(30), torch.rand(2, 8))
    assert sum(r.kind == "linear" and r.calls == 1 for r in graph.layers.values()) == 30
    assert graph.layers["stacked"].calls == 30
    last = graph.layers["blocks.29"].pre
    assert last != graph.layers["blocks.9"].pre


def test_a_step_that_differs_is_recorded() -> None:
    """A layer that is called at one late step alone is seen, and what comes after it as well."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.every, self.once, self.head = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            v, out = torch.zeros(x.shape[1], 8), 0
            for t, part in enumerate(x):
                v = v / 2 + self.every(part)
                if t == 30:
                    v = v + self.once((v > 0).float())
                s = (v > 0.2).float()
                v = v * (1 - s)
                out = out + s
            return self.head(out)

    graph = trace(Late(), torch.rand(40, 2, 8))
    assert graph.layers["once"].calls == 1
    assert graph.layers["once"].pre
    assert graph.layers["once"].post
    assert graph.layers["every"].calls == 40


def test_what_a_late_step_emits_counts() -> None:
    """A function whose values are no spikes at a late step alone hands on no spikes."""

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return (x > 0).float() * (1 + 0.37 * (x > 5).float())

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            v, out = 0.0, []
            for part in x:
                v = v / 2 + self.one(part)
                out.append(self.two(Late.apply(v)))
            return torch.stack(out)

    x = torch.rand(40, 2, 8)
    x[30] *= 100
    signal = trace(Net(), x).layers["two"].input_signal
    assert signal is not None
    assert signal.kind not in ("spike", "integer")


def test_parameters_written_at_a_late_step_are_restored() -> None:
    """Steps that are not recorded leave a parameter as it was too."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.decay = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            v = torch.zeros(x.shape[1], 8)
            for t, part in enumerate(x):
                if t > 20:
                    self.decay.data.mul_(0.99)
                v = self.decay * v + self.layer(part)
                v = v * (v < 1)
            return v

    model = Writes()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, torch.rand(60, 2, 8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_model_runs_once_for_plan_and_masks() -> None:
    """One call reads the model once for its decisions and for the neurons that layers drive."""
    runs = []

    class Counted(Written):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(len(x))
            return super().forward(x)

    spikenm_fx.sparsify(Counted(), "2:4", example_inputs=torch.rand(2, 6, 16))
    assert len(runs) == 1


class Sliced(nn.Module):
    """A state that goes along channels, not time: as many equal steps as others have in time."""

    def __init__(self, take: str) -> None:
        super().__init__()
        self.take = take
        self.first, self.mix = nn.Linear(8, 48), nn.Linear(4, 4)
        self.second, self.head = nn.Linear(48, 16), nn.Linear(16, 4)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Twelve parts of the channels of ``x`` (N, 48), each (N, 4)."""
        if self.take == "chunk":
            return list(x.chunk(12, 1))
        if self.take == "every":
            return [x[:, i::12] for i in range(12)]
        if self.take == "late":
            return [x[:, i : i + 4] for i in (*range(0, 44, 4), 43)]
        return [x[:, 4 * i : 4 * i + 4] for i in range(12)]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        carry, out = x.new_zeros(x.shape[0], 4), []
        for part in self.parts(x):
            carry = carry / 2 + torch.relu(self.mix(part + carry))
            spikes = (carry > 0.3).to(x.dtype)
            carry = carry * (1 - spikes)
            out.append(spikes)
        return self.head(torch.relu(self.second(torch.cat(out, 1))))


class OwnWeights(nn.Module):
    """Parts that a loop goes through, each made with a weight of its own on one line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(14)])
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[0], 8), 0
        for part in [torch.relu(nn.functional.linear(x, w) + 0.1) * 2 for w in self.ws]:
            v = v / 2 + self.mix(part)
            spikes = (v > 0.2).float()
            v = v * (1 - spikes)
            out = out + spikes
        return self.head(out)


@pytest.mark.parametrize("take", ["slice", "chunk", "every", "late"])
def test_state_over_channels_tells_what_all_steps_tell(take: str) -> None:
    """Layers, pairs and coupled channels are those of a trace that records each step."""
    torch.manual_seed(0)
    model, x = Sliced(take), torch.rand(2, 8)
    short, whole = trace(model, x), trace(model, x, measure=True)
    assert told(short) == told(whole)
    assert coupled(short) == coupled(whole)


def test_parts_with_weights_of_their_own_are_all_read() -> None:
    """The loop's layer reads each of the fourteen weights' outputs, none of which is a head."""
    graph = trace(OwnWeights(), torch.rand(2, 8))
    assert {graph.layers[f"ws.{i}"].feeds for i in range(14)} == {("mix",)}
    assert len(graph.layers["mix"].pre) == 14


@pytest.mark.parametrize("take", ["slice", "chunk", "every", "late"])
def test_channels_over_which_a_state_goes_are_permuted_rightly(take: str) -> None:
    """Whatever is permuted, the model computes the same."""
    torch.manual_seed(0)
    model, x = Sliced(take).double(), torch.rand(5, 8, dtype=torch.double)
    before = model(x)
    spikenm_fx.permute(model, x)
    torch.testing.assert_close(model(x), before)


def test_a_tensor_that_grows_with_the_steps_is_no_repeat() -> None:
    """What has another shape at each step is recorded at each."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen = torch.zeros(0, x.shape[1], 8)
            for part in x:
                new = (self.layer(part) + seen.sum(0) > 0).float()
                seen = torch.cat([seen, new[None]])
            return self.head(seen)

    graph = trace(Cache(), torch.rand(30, 2, 8))
    assert graph.layers["head"].input_shape == (30, 2, 8)
    assert graph.layers["layer"].calls == 30


def test_tensors_that_a_model_holds_stay_what_they_are() -> None:
    """Buffers, and state that neurons return, are ordinary tensors during and after a long loop."""
    kinds: set[type] = set()

    class Neuron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v: Tensor | float = 0.0

        def reset(self) -> None:
            self.v = 0.0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.v = self.v / 2 + x
            spikes = (self.v > 0.3).float()
            self.v = self.v * (1 - spikes)
            kinds.add(type(self.v))
            return spikes, self.v

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.neuron, self.head = nn.Linear(8, 8), Neuron(), nn.Linear(8, 4)
            self.register_buffer("gain", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            out = 0
            for part in x:
                spikes, _ = self.neuron(self.layer(part) * self.gain.contiguous())
                kinds.add(type(self.gain))
                out = out + self.head(spikes)
            return out

    model = Net()
    graph = trace(model, torch.rand(40, 2, 8))
    assert kinds == {Tensor}
    assert graph.layers["head"].calls == 40
    assert type(model.gain) is Tensor
    assert model.neuron.v == 0.0


def test_neurons_that_hand_their_state_on_are_looked_at_a_few_times() -> None:
    """Steps beyond the first few of Norse's cells, whose state is a named tuple, take few calls."""
    norse = pytest.importorskip("norse.torch")

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(12, 16), nn.Linear(16, 4)
            self.fire, self.last = norse.LIFCell(), norse.LIFCell()

        def forward(self, x: Tensor) -> Tensor:
            state = last = None
            spikes = []
            for step in x:
                z, state = self.fire(self.hidden(step), state)
                z, last = self.last(self.out(z), last)
                spikes.append(z)
            return torch.stack(spikes)

    torch.manual_seed(0)
    model, counts = Cells(), []
    for steps in (40, 140):
        calls = 0

        def count(frame: types.FrameType, event: str, _arg: object) -> None:
            nonlocal calls
            calls += event == "call" and "spikenm_fx" in frame.f_code.co_filename

        sys.setprofile(count)
        try:
            graph = trace(model, torch.rand(steps, 2, 12))
        finally:
            sys.setprofile(None)
        assert graph.layers["hidden"].calls == steps
        assert graph.layers["out"].input_signal.kind == "spike"
        counts.append(calls)
    each = (counts[1] - counts[0]) / 100
    assert each < 600, f"{each} calls for each step of four layers and neurons"
