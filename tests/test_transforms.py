# SPDX-License-Identifier: Apache-2.0
"""Sparse models under torch.func, torch.compile, torch.export, tracing and checkpointing, unfolded.

The oracle throughout is a plain model of the same class that holds the masked weights: whatever a
transform computes there it computes here, in both modes, or one error says to fold first.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loops import (
    LAYERS,
    OverTime,
    Soft,
    close,
    dense,
    heard,
    logits,
    masks,
    same,
    sequences,
    sparse,
    sparse_spiking,
    spiking_net,
    step_of,
    train,
    train_step,
)
from strategies import ALL_LAYERS, batches
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import spikenm_fx
from spikenm_fx.errors import SpikeNMError
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

RUN = int(os.environ.get("SPIKENM_FX_STEPS", "40"))
"""Steps of a whole run; ``SPIKENM_FX_STEPS`` sets how many, 100 were tried."""
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def smooth() -> nn.Module:
    """A network with second derivatives."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def pair(*, training: bool, steps: int = 3, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A sparse model after some steps, and a plain one with its masked weights of this mode."""
    options.setdefault("method", SpikeNM(decay=0.0, eid=None))
    model = spikenm_fx.sparsify(smooth(), "2:4", rules=ALL_LAYERS, **options).train()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), batches(steps))
    model.train(training)
    plain = smooth().train(training)
    with torch.no_grad():
        for name in LAYERS:
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
            plain.get_submodule(name).bias.copy_(model.get_submodule(name).bias)
    return model, plain


def own(model: nn.Module) -> dict[str, Tensor]:
    """Detached parameters that take part in the forward pass."""
    return {n: p.detach() for n, p in model.named_parameters() if _dense(n)}


def _dense(name: str) -> bool:
    """Whether a dense model has a parameter of this name."""
    return name.endswith((".weight", ".bias"))


def loss_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).square().mean()


def compare(model: nn.Module, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that gradients agree: all of them in training, where undrawn weights learn on."""
    kept = {f"{name}.weight": mask for name, mask in masks(model).items()}
    for name, gradient in expected.items():
        where = kept[name] if name in kept and not model.training else torch.tensor(True)
        pair = found[name] * where, gradient * where
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def or_says_fold() -> Iterator[None]:
    """Lets an error of ours pass that names the way out."""
    try:
        yield
    except SpikeNMError as error:
        if "fold" not in str(error):
            raise


# -- torch.func -----------------------------------------------------------------------------------


@MODES
def test_per_sample_gradients(training: bool) -> None:
    """vmap(grad): one gradient for each sample, those of the plain model."""
    model, plain = pair(training=training)
    x = batches(1, size=5)[0]

    def per_sample(net: nn.Module) -> dict[str, Tensor]:
        gradient = torch.func.grad(lambda p, one: loss_of(net, p, one[None]))
        return torch.func.vmap(gradient, in_dims=(None, 0))(own(net), x)

    found, expected = per_sample(model), per_sample(plain)
    assert found["2.weight"].shape == (5, 16, 16)
    compare(model, found, expected)


@MODES
def test_jacobians(training: bool) -> None:
    """Jacrev in the inputs and in the parameters, and per-sample by vmap over it."""
    model, plain = pair(training=training)
    x = batches(1, size=2)[0]
    torch.testing.assert_close(torch.func.jacrev(model)(x), torch.func.jacrev(plain)(x))

    def jacobian(net: nn.Module) -> dict[str, Tensor]:
        return torch.func.jacrev(lambda p: functional_call(net, p, (x,)))(own(net))

    compare(model, jacobian(model), jacobian(plain))


@MODES
def test_hessian_vector_products(training: bool) -> None:
    """Twice backward, by autograd and by torch.func, equals the plain model's."""
    model, plain = pair(training=training)
    x = batches(1)[0]
    vector = {n: torch.randn_like(p) for n, p in own(plain).items()}
    for name, mask in masks(model).items():
        vector[f"{name}.weight"] *= mask  # directions within the mask, which both models have

    def by_autograd(net: nn.Module) -> dict[str, Tensor]:
        names = [n for n, _ in net.named_parameters() if _dense(n)]
        parameters = [dict(net.named_parameters())[n] for n in names]
        gradients = torch.autograd.grad(net(x).square().mean(), parameters, create_graph=True)
        product = sum((g * vector[n]).sum() for n, g in zip(names, gradients, strict=True))
        return dict(zip(names, torch.autograd.grad(product, parameters), strict=True))

    def by_func(net: nn.Module) -> dict[str, Tensor]:
        gradient = torch.func.grad(lambda p: loss_of(net, p, x))
        _, back = torch.func.vjp(gradient, own(net))
        return back(vector)[0]

    expected = by_autograd(plain)
    assert max(float(h.abs().max()) for h in expected.values()) > 0
    for product in (by_autograd, by_func):
        compare(model, product(model), expected)


@MODES
def test_forward_mode(training: bool) -> None:
    """A jvp is that of the plain model, or an error says to fold; never a silent zero."""
    model, plain = pair(training=training)
    x = batches(1)[0]
    tangent = torch.randn_like(x)
    _, expected = torch.func.jvp(plain, (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(model, (x,), (tangent,))[1], expected)
    direction = {n: torch.randn_like(p) for n, p in own(plain).items()}
    for name, mask in masks(model).items():
        direction[f"{name}.weight"] *= mask

    def along(net: nn.Module) -> Tensor:
        values = {n: p.clone() for n, p in own(net).items()}
        return torch.func.jvp(lambda p: loss_of(net, p, x), (values,), (direction,))[1]

    try:
        found = along(model)
    except (SpikeNMError, RuntimeError, NotImplementedError):
        pass  # torch itself says that a custom function has no forward mode: loud enough
    else:
        torch.testing.assert_close(found, along(plain))


@MODES
def test_ensembles(training: bool) -> None:
    """Stacked states under vmap: each member computes what it computes alone."""
    members = [
        spikenm_fx.sparsify(
            smooth(), "2:4", rules=ALL_LAYERS, seed=seed, method=SpikeNM(eid=None)
        ).train(training)
        for seed in range(3)
    ]
    for member in members:
        nn.init.normal_(member[0].bias)
    parameters, buffers = torch.func.stack_module_state(members)
    skeleton = copy.deepcopy(members[0])
    x = batches(1)[0]

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (x,))

    with or_says_fold():
        found = torch.func.vmap(run)(parameters, buffers)
        torch.testing.assert_close(found, torch.stack([member(x) for member in members]))


@MODES
def test_transforms_leave_no_trace(training: bool) -> None:
    """After a transform the model trains as one that never saw it."""
    runs = []
    for transformed in (True, False):
        model, _ = pair(training=training)
        if transformed:
            test = torch.func.grad(lambda p: loss_of(model, p, batches(1)[0]))  # noqa: B023
            test(own(model))
            torch.func.jacrev(model)(batches(1)[0])
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        train(model, optimizer, batches(3, seed=4))
        runs.append(model.state_dict())
    close(*runs, rtol=0, atol=0)


# -- torch.compile --------------------------------------------------------------------------------


class Counting:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """``torch.compile(fullgraph=True)``: a graph break raises; recompilations are counted."""
    torch._dynamo.reset()

    def wrap(model: nn.Module, backend: Any) -> Any:
        return torch.compile(model, fullgraph=True, backend=backend)

    yield wrap
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("nm", ["2:4", "1:8"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_whole_run_compiles_once(compiled: Any, nm: str) -> None:
    """A whole run, fade and freeze included: no graph break, at most two recompilations a mode."""
    models = [
        spikenm_fx.sparsify(smooth(), nm, rules=ALL_LAYERS, total_steps=RUN).train()
        for _ in range(2)
    ]
    count = Counting()
    run, data = compiled(models[0], count), batches(RUN)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    validated = 0
    with heard():  # that a fade has not ended
        for step, x in enumerate(data):
            train_step(run, optimizers[0], x)
            train_step(models[1], optimizers[1], x)
            if step % (RUN // 5) == RUN // 5 - 1:
                graphs = count.graphs
                with torch.no_grad():
                    found = [net.eval()(x) for net in (run, models[1])]
                torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
                run.train(), models[1].train()
                validated += count.graphs - graphs
    assert step_of(models[0]) == step_of(models[1]) == RUN
    assert 1 <= count.graphs - validated <= 3
    assert 1 <= validated <= 3
    close(dense(models[0]), dense(models[1]), rtol=1e-3, atol=1e-4)
    close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_spiking_networks_compile_with_eid(compiled: Any, backend: str) -> None:
    """Credits are measured around compiled graphs as around eager ones, or EID says it is off."""
    models = [sparse_spiking(), sparse_spiking()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    torch._dynamo.reset()
    run = torch.compile(models[0], backend=backend)
    with heard() as said:
        for x in sequences(5, steps=2):
            train_step(run, optimizers[0], x)
            train_step(models[1], optimizers[1], x)
    assert step_of(models[0]) == 5
    if not said:
        close(dense(models[0]), dense(models[1]), rtol=1e-3, atol=1e-4)
        close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "without"])
@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "breaks allowed"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_spiking_networks_with_eid_compile_whole(fullgraph: bool, examples: bool) -> None:
    """A whole run with EID, freeze included: whole graphs, at most two recompilations a mode.

    Credits are measured in all of them, also where the neurons are found while a graph is made.
    """
    torch._dynamo.reset()
    options = {"example_inputs": sequences(1, steps=2)[0]} if examples else {}
    model = sparse_spiking(eid=EID(every=10), total_steps=RUN, **options)
    count = Counting()
    run = torch.compile(model, fullgraph=fullgraph, backend=count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first, made, validated = logits(model), 0, 0
    with heard() as said:
        for step, x in enumerate(sequences(RUN, steps=2)):
            before = count.graphs
            train_step(run, optimizer, x)
            made += count.graphs - before
            if step in (0, 1, RUN // 2, RUN - 2):
                run.eval()
                with torch.no_grad():
                    before, found = count.graphs, run(x)
                    validated += count.graphs - before
                    torch.testing.assert_close(found, model(x))
                run.train()
    assert step_of(model) == RUN
    assert not same(first, logits(model))
    assert 1 <= validated <= 3
    assert 1 <= made <= 3
    assert not said
    averages = [v for k, v in model.state_dict().items() if k.endswith("_eid")]
    assert sum(bool(v.any()) for v in averages) == 2
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_optimizer_step() -> None:
    """``torch.compile`` of ``optimizer.step``: the same run, and no code of masks is compiled."""
    models = [sparse_spiking(), sparse_spiking()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
    torch.compiler.reset()
    step = torch.compile(lambda: optimizers[0].step(), backend="eager")
    for x in sequences(3):
        optimizers[0].zero_grad()
        models[0](x).square().mean().backward()
        step()
        train_step(models[1], optimizers[1], x)
    torch.compiler.reset()
    assert step_of(models[0]) == 3
    assert same(models[0].state_dict(), models[1].state_dict())


# -- torch.export, torch.jit, torch.fx ------------------------------------------------------------


@MODES
def test_export(training: bool) -> None:
    """torch.export of an unfolded model computes what the model computes."""
    model, plain = pair(training=training)
    x = batches(1)[0]
    with or_says_fold():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), plain(x))


@MODES
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace(training: bool) -> None:
    """torch.jit.trace of an unfolded model computes what the model computes."""
    model, plain = pair(training=training)
    x = batches(1)[0]
    with or_says_fold(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # nothing baked in by accident
        traced = torch.jit.trace(model, (x,))
        other = batches(1, seed=7)[0]
        torch.testing.assert_close(traced(other), plain(other))


@MODES
def test_symbolic_tracing(training: bool) -> None:
    """A graph module shares the masks: it follows the next steps too, or an error says to fold."""
    model, plain = pair(training=training)
    x = batches(1)[0]
    with or_says_fold():
        graph = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(graph(x), plain(x))
        model.train()
        train(model, torch.optim.SGD(model.parameters(), lr=0.5), batches(2))
        model.train(training), graph.train(training)
        torch.testing.assert_close(graph(x), model(x))


@MODES
def test_a_captured_graph_of_aten_operations(training: bool) -> None:
    """make_fx of a loss and its gradients equals the plain model's gradients."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, plain = pair(training=training)
    x = batches(1)[0]

    def gradients(net: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return torch.func.grad(lambda p: loss_of(net, p, x))

    graph = make_fx(gradients(model))(own(model))
    compare(model, graph(own(model)), gradients(plain)(own(plain)))


# -- all of them, in a step in which credits are due -----------------------------------------------


def _soft() -> nn.Module:
    torch.manual_seed(0)
    layers = [OverTime(nn.Linear(8, 16)), Soft(), OverTime(nn.Linear(16, 16)), Soft()]
    return nn.Sequential(*layers, OverTime(nn.Linear(16, 4)))


def _traced(net: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(net, (x,), check_trace=False)(x)


def _hvp(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def _make_fx(net: nn.Module, x: Tensor) -> Tensor:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(net)(x)(x)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda net, x: torch.func.grad(lambda x: net(x).square().mean())(x),
    "per sample": lambda net, x: torch.func.vmap(
        torch.func.grad(lambda one: net(one[:, None]).square().mean()), in_dims=1
    )(x),
    "vmap": lambda net, x: torch.func.vmap(net)(torch.stack([x, x / 2])),
    "jacrev": lambda net, x: torch.func.jacrev(net)(x[:, :2]),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
    "hvp": _hvp,
    "export": lambda net, x: torch.export.export(net, (x,)).module()(x),
    "jit.trace": _traced,
    "make_fx": _make_fx,
    "inference": lambda net, x: torch.inference_mode()(net)(x).clone(),
}


@pytest.mark.slow
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "without"])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_where_credits_are_due(kind: str, examples: bool) -> None:
    """EID neither breaks a transform nor learns from it: the step trains as if nothing was."""
    options = {"example_inputs": sequences(1)[0]} if examples else {}
    method = SpikeNM(eid=EID(every=1, weight=(1.0, 1.0)))
    models = [
        spikenm_fx.sparsify(_soft(), "2:4", rules=ALL_LAYERS, method=method, **options).train()
        for _ in range(2)
    ]
    plain = _soft()
    with torch.no_grad():
        for name in ("0.layer", "2.layer", "4.layer"):
            weight = models[0].get_submodule(name).weight
            plain.get_submodule(name).weight.copy_(weight)
    x = sequences(1)[0]
    expected = TRANSFORMS[kind](plain, x)
    assert bool(expected.any())
    with heard(), or_says_fold():
        torch.testing.assert_close(TRANSFORMS[kind](models[0], x), expected, rtol=1e-4, atol=1e-5)
    for model in models:
        with heard():  # the first pass of a step is what its credits are of
            data = [x, *sequences(2, seed=3)]
            train(model, torch.optim.SGD(model.parameters(), lr=0.05), data)
    close(models[0].state_dict(), models[1].state_dict())


# -- activation checkpointing ---------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Recomputes blocks of the network in backward."""

    def __init__(self, net: nn.Sequential, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        x = checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=self.reentrant)
        return checkpoint(self.net[3:], x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "first forward"])
def test_checkpointing_with_eid(reentrant: bool, examples: bool) -> None:
    """Hand-written neurons, EID at each step: weights and logits as without recomputation."""
    models = []
    for mode in (reentrant, None):
        net = Checkpointed(spiking_net(), mode)
        example = sequences(1)[0] if examples else None
        method = SpikeNM(eid=EID(every=1, weight=(1.0, 1.0)))
        spikenm_fx.sparsify(net, "2:4", rules=ALL_LAYERS, method=method, example_inputs=example)
        models.append(net.train())
        with heard() as said:
            train(net, torch.optim.SGD(net.parameters(), lr=0.05), sequences(4))
        assert not said
    assert [step_of(m) for m in models] == [4, 4]
    close(dense(models[0]), dense(models[1]))
    close(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_across_steps(reentrant: bool) -> None:
    """One mask in forward and recomputation, another one in the next step."""
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, x in enumerate(batches(3)):
        optimizer.zero_grad()
        seen: list[Tensor] = []
        hook = model[2].register_forward_hook(
            lambda layer, *_, seen=seen: seen.append(layer.weight.detach() != 0)
        )
        checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).square().mean().backward()
        hook.remove()
        assert len(seen) == 2
        assert torch.equal(*seen)
        optimizer.step()
        assert step_of(model) == step + 1
        assert not torch.equal(seen[0], model[2].weight.detach() != 0)
