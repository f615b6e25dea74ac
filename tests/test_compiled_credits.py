# SPDX-License-Identifier: Apache-2.0
"""EID inside of compiled graphs: whole graphs, few of them, and the credits of eager training.

The oracle is the same model trained without a compiler, from the same start on the same data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loops import (
    OverTime,
    Soft,
    Triangle,
    dense,
    heard,
    logits,
    same,
    sequences,
    sparse_spiking,
    step_of,
    train_step,
)
from strategies import ALL_LAYERS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spikenm_fx
from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


class Counting:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Held(nn.Module):
    """A neuron that holds its membrane from one step to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.v: float | Tensor = 0.0

    def reset(self) -> None:
        self.v = 0.0

    def forward(self, x: Tensor) -> Tensor:
        v = self.v + (x - self.v) / 2
        out = Triangle.apply(v - 0.6)
        self.v = v * (1 - out.detach())
        return out


class Carried(nn.Module):
    """The same with a membrane that its caller carries."""

    def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = x / 2 if v is None else v + (x - v) / 2
        out = Triangle.apply(v - 0.6)
        return out, v * (1 - out.detach())


class Loop(nn.Module):
    """A loop over time, over neurons that hold their state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.neuron, self.last = Held(), Held()

    def forward(self, x: Tensor) -> Tensor:
        self.neuron.reset(), self.last.reset()
        return torch.stack([self.last(self.second(self.neuron(self.first(now)))) for now in x])


class Carrying(nn.Module):
    """The same with states that the loop carries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.neuron, self.last = Carried(), Carried()

    def forward(self, x: Tensor) -> Tensor:
        u, v, found = None, None, []
        for now in x:
            out, u = self.neuron(self.first(now), u)
            out, v = self.last(self.second(out), v=v)
            found.append(out)
        return torch.stack(found)


class Recomputed(nn.Module):
    """A part that is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = over_time()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class BatchFirst(nn.Module):
    """The neuron's inputs lie in memory otherwise than the outputs of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OverTime(nn.Linear(8, 16)), OverTime(nn.Linear(16, 4))
        self.neuron, self.last = SequenceLIF(), SequenceLIF()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.neuron(self.first(x).flip(2))))


def over_time() -> nn.Module:
    return nn.Sequential(
        *(OverTime(nn.Linear(8, 16)), nn.Dropout(0.0), SequenceLIF()),
        *(OverTime(nn.Linear(16, 4)), SequenceLIF()),
    )


class Together(nn.Module):
    """All of these in one graph: what a compiler of kernels takes long for is compiled once."""

    def __init__(self) -> None:
        super().__init__()
        self.over_time = nn.Sequential(OverTime(nn.Linear(8, 16)), SequenceLIF())
        self.layer, self.held = nn.Linear(16, 16), Held()
        self.again = nn.Sequential(OverTime(nn.Linear(16, 4)), SequenceLIF())

    def forward(self, x: Tensor) -> Tensor:
        self.held.reset()
        x = torch.stack([self.held(self.layer(now)) for now in self.over_time(x)])
        return checkpoint(self.again, x, use_reentrant=False)


STYLES = {
    "over time": over_time,
    "held": Loop,
    "carried": Carrying,
    "checkpointed": Recomputed,
    "exchanged": BatchFirst,
}


def credits_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.endswith("_eid")}


def sparse(build: Callable[[], nn.Module], *, every: int = 2, examples: bool = True) -> nn.Module:
    torch.manual_seed(0)
    options = {"example_inputs": sequences(1, steps=2)[0]} if examples else {}
    method = SpikeNM(eid=EID(every=every))
    return spikenm_fx.sparsify(build(), "2:4", method=method, rules=ALL_LAYERS, **options).train()


def trained(model: nn.Module, run: Any, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in sequences(steps, steps=2):  # in two a state is made and used: graphs unroll them all
        train_step(run, optimizer, x)


def agree(model: nn.Module, other: nn.Module) -> None:
    """Both learnt the same credits, logits and weights."""
    found, expected = credits_of(model), credits_of(other)
    assert any(bool(value.any()) for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda m, k=key: f"{k}: {m}")
    for a, b in ((dense(model), dense(other)), (logits(model), logits(other))):
        for key, value in b.items():
            torch.testing.assert_close(a[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "first forward"])
@pytest.mark.parametrize("style", STYLES)
def test_credits_are_those_of_eager_training(style: str, examples: bool) -> None:
    """However neurons keep their state, and wherever their inputs lie: one whole graph."""
    models = [sparse(STYLES[style], examples=examples) for _ in range(2)]
    count = Counting()
    with heard() as said:
        trained(models[0], torch.compile(models[0], fullgraph=True, backend=count))
        trained(models[1], models[1])
    assert not said
    assert len(count.graphs) <= 2
    agree(*models)


class Stepped(nn.Module):
    """Single-step neurons of a framework in a loop; states carried where they are returned."""

    def __init__(self, first: nn.Module, last: nn.Module, *, carries: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.carries = nn.Linear(8, 16), nn.Linear(16, 4), carries
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        found, (u, v) = [], (_fresh(self.first), _fresh(self.last))
        for now in x:
            if self.carries:
                out, u = self.first(self.fc1(now), u)
                out, v = self.last(self.fc2(out), v)
            else:
                out = self.last(self.fc2(self.first(self.fc1(now))))
            found.append(out)
        return torch.stack(found)


def _fresh(neuron: nn.Module) -> Any:
    """What a neuron is given at first: snnTorch's goes on from its last state otherwise."""
    return neuron.reset_mem() if hasattr(neuron, "reset_mem") else None


def _spikingjelly(mode: str) -> nn.Module:
    from spikingjelly.activation_based import layer, neuron

    def node() -> nn.Module:
        return neuron.LIFNode(step_mode=mode, v_threshold=0.5, detach_reset=True)

    if mode == "s":
        return Stepped(node(), node(), carries=False)
    linears = layer.Linear(8, 16, step_mode=mode), layer.Linear(16, 4, step_mode=mode)
    return nn.Sequential(linears[0], node(), linears[1], node())


def _snntorch() -> nn.Module:
    import snntorch

    return Stepped(*(snntorch.Leaky(beta=0.5, threshold=0.4) for _ in range(2)), carries=True)


def _norse() -> nn.Module:
    from norse.torch import LIFBoxCell, LIFBoxParameters

    def cell() -> nn.Module:
        return LIFBoxCell(LIFBoxParameters(v_th=torch.tensor(0.4), tau_mem_inv=torch.tensor(500.0)))

    return Stepped(cell(), cell(), carries=True)


FRAMEWORK_NETS: dict[str, Callable[[], nn.Module]] = {
    "spikingjelly, all steps in a call": lambda: _spikingjelly("m"),
    "spikingjelly, step by step": lambda: _spikingjelly("s"),
    "snntorch": _snntorch,
    "norse": _norse,
}


@pytest.mark.parametrize("name", FRAMEWORK_NETS)
def test_neurons_of_frameworks(name: str) -> None:
    """Their states in graphs, also as named tuples; breaks are theirs, credits are the same."""
    models = [sparse(FRAMEWORK_NETS[name]) for _ in range(2)]
    runs = torch.compile(models[0], backend="eager"), models[1]
    for model, run in zip(models, runs, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in sequences(3, steps=2):
            for module in model.modules():
                if hasattr(module, "reset") and name.startswith("spikingjelly"):
                    module.reset()
            train_step(run, optimizer, x)
    agree(*models)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_that_use_memory_again(backend: str) -> None:
    """Credits are of what layers and neurons got, not of what was written there afterwards.

    Of layers over time, of a loop over a neuron that holds its state, and of a recomputed part.
    """
    models = [sparse(Together, every=1) for _ in range(2)]
    trained(models[0], torch.compile(models[0], fullgraph=True, backend=backend), 2)
    trained(models[1], models[1], 2)
    agree(*models)


def test_a_run_makes_few_graphs() -> None:
    """A whole run with the fade of 1:8, refreshes and the freeze: two recompilations at most."""
    x = sequences(1, steps=2)[0]
    models = [
        sparse_spiking("1:8", eid=EID(every=3), total_steps=20, example_inputs=x) for _ in range(2)
    ]
    count = Counting()
    run = torch.compile(models[0], fullgraph=True, backend=count)
    trained(models[0], run, 20)
    trained(models[1], models[1], 20)
    assert 1 <= len(count.graphs) <= 3
    assert step_of(models[0]) == 20
    agree(*models)


def test_only_steps_that_are_due_tell() -> None:
    """The graph of all other steps holds no operator of ours."""
    model, count = sparse(over_time, every=3), Counting()
    trained(model, torch.compile(model, fullgraph=True, backend=count), 3)
    telling = ["spikenm_fx" in graph.code for graph in count.graphs]
    assert telling == [True, False]


def test_micro_batches() -> None:
    """The first pass of a step is looked at, as in eager training; nothing is kept after it."""
    models = [sparse(over_time) for _ in range(2)]
    runs = torch.compile(models[0], fullgraph=True, backend="eager"), models[1]
    for model, run in zip(models, runs, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in sequences(3, steps=2):
            optimizer.zero_grad()
            for part in x.chunk(3, dim=1):
                (run(part).square().mean() / 3).backward()
            optimizer.step()
    agree(*models)


def test_copies_of_a_compiled_model() -> None:
    """A deep copy learns its own credits, and the model it was made of none of them."""
    model = sparse(over_time, every=1)
    trained(model, torch.compile(model, fullgraph=True, backend="eager"), 1)
    before = credits_of(model)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    trained(twin, torch.compile(twin, fullgraph=True, backend="eager"), 3)
    trained(third, third, 3)
    agree(twin, third)
    assert same(before, credits_of(model))
    assert not same(before, credits_of(twin))


def test_parts_that_are_compiled() -> None:
    """Some modules compiled, others not, a neuron in another graph than its layer."""
    models = [sparse(over_time) for _ in range(2)]
    for part in (models[0][0], models[0][4]):
        part.compile(fullgraph=True, backend="eager")
    for model in models:
        trained(model, model)
    agree(*models)


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "first forward"])
def test_a_model_of_torchs_own_class_compiled_in_place(examples: bool) -> None:
    """Dynamo takes its forward alone: it is one graph all the same, and nothing of ours breaks it.

    What is looked at before the graph is made must not be left out of it afterwards.
    """
    models, count = [sparse(over_time, examples=examples) for _ in range(2)], Counting()
    models[0].compile(backend=count)
    torch._dynamo.utils.counters.clear()
    for model in models:
        trained(model, model, 4)
        model.eval()
    x = sequences(1, steps=2)[0]
    with torch.no_grad():
        torch.testing.assert_close(models[0](x), models[1](x))
    assert not torch._dynamo.utils.counters["graph_break"]
    layers = sum(graph.code.count("linear(") for graph in count.graphs)
    assert 2 <= len(count.graphs) <= 4
    assert layers == 2 * len([g for g in count.graphs if "linear(" in g.code])
    agree(*models)


def test_alike_layers_share_a_graph() -> None:
    """What a graph needs of a hook is an input of it: no graph of its own for each layer."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(OverTime(nn.Linear(8, 8)), SequenceLIF()) for _ in range(6)]
    model, count = sparse(lambda: nn.Sequential(*blocks), every=1), Counting()
    eager = copy.deepcopy(model)
    for block in model:
        block.compile(fullgraph=True, backend=count)
    trained(model, model, 2)
    trained(eager, eager, 2)
    assert 1 <= len(count.graphs) < len(blocks)
    agree(model, eager)


def test_exported_training_graphs_run_without_us() -> None:
    """An export holds none of our operators, also in a step in which credits are due."""
    model = sparse(over_time)
    program = torch.export.export(model, (sequences(1, steps=2)[0],))
    assert "saw_layer" not in str(program.graph)
    assert "spikenm_fx" not in program.graph_module.code


def test_evaluation_tells_nothing() -> None:
    """Nor does a forward pass without gradients."""
    model, count = sparse(over_time), Counting()
    run, x = torch.compile(model, fullgraph=True, backend=count), sequences(1, steps=2)[0]
    with torch.no_grad():
        run(x)
    run.eval()
    run(x)
    assert count.graphs
    assert not any("spikenm_fx" in graph.code for graph in count.graphs)


def test_a_compiled_transform_has_no_credits() -> None:
    """torch.func inside of a compiled function gives its gradients, and EID says that it is off."""
    layers = OverTime(nn.Linear(8, 16)), Soft(), OverTime(nn.Linear(16, 4)), Soft()
    model, x = sparse(lambda: nn.Sequential(*layers)), sequences(1, steps=2)[0]

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: model(x).square().mean())(x)

    expected = gradient(x)
    found = torch.compile(gradient, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, expected)
