# SPDX-License-Identifier: Apache-2.0
"""Activity of membranes as importance: rankings, growth and schedule by brute force."""

from __future__ import annotations

import copy

import pytest
import torch
from strategies import ALL_LAYERS, most_nonzero, network
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.bench.training import KnownLIF
from spikenm_fx.demo.networks import OverTime, SpikingConvNet
from spikenm_fx.errors import PlanError
from spikenm_fx.masks.methods.activity import Activity

T, BATCH = 3, 4


def spiking(*, norm: bool = True) -> nn.Module:
    """Two convolutions, a hidden layer behind a flattened map, a readout; known neurons."""
    torch.manual_seed(0)
    model = SpikingConvNet((8, 8), (1,), inputs=3, size=4, hidden=8)
    for module in model.modules():
        if type(module).__name__ == "LIF":
            module.__class__ = KnownLIF
    if not norm:
        for over_time in model.modules():
            if isinstance(over_time, OverTime) and isinstance(over_time.module, nn.Sequential):
                over_time.module[1] = nn.Identity()
    return model


def inputs(seed: int = 0) -> Tensor:
    return 3 * torch.rand(T, BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def sparse(nm: str = "2:4", *, method: Activity | None = None, **options) -> nn.Module:
    method = method or Activity(growth=0.0)
    return spikenm_fx.sparsify(
        spiking(), nm, method=method, example_inputs=inputs(), **options
    ).train()


def membranes(currents: Tensor) -> list[float]:
    """Mean |V| of each channel of ``[T, B, C, *]``, value by value."""
    means = []
    for channel in range(currents.shape[2]):
        flat = currents[:, :, channel].reshape(T, -1)
        total = 0.0
        for place in range(flat.shape[1]):
            v = 0.0
            for t in range(T):
                v = v + (float(flat[t, place]) - v) / 2
                total += abs(v)
                v = 0.0 if v >= 1 else v
        means.append(total / flat.numel())
    return means


def received(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each neuron gets in evaluation mode."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, n=name: found.update({n: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, KnownLIF)
    ]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return {name: value.detach() for name, value in found.items()}


def expected_mask(importance: list[float], shape: torch.Size, keep: int, of: int) -> Tensor:
    """The ``keep`` most important input channels of each block, the same for all outputs."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for block in range(0, len(importance), of):
        order = sorted(range(block, block + of), key=lambda i: -importance[i])
        mask[:, order[:keep]] = True
    return mask


@pytest.mark.parametrize("nm", ["2:4", "1:8"])
def test_ranking_equals_a_double_loop(nm: str) -> None:
    """Of the examples: membranes by hand, channels of a flattened map once for each pixel."""
    keep, of = map(int, nm.split(":"))
    model = sparse(nm)
    currents = received(spiking(), inputs())
    conv = model.features[2].module[0].weight.detach() != 0
    first = membranes(currents["features.1"])
    assert torch.equal(conv, expected_mask(first, conv.shape, keep, of))
    hidden = model.hidden.weight.detach() != 0
    second = [v for v in membranes(currents["features.3"]) for _ in range(4)]
    assert torch.equal(hidden, expected_mask(second, hidden.shape, keep, of))
    assert spikenm_fx.verify(spikenm_fx.fold(model.eval())).valid


def test_a_later_measurement_is_of_training() -> None:
    """At each refresh the masks follow what the neurons received in that step's forward."""
    model = sparse(method=Activity(growth=0.0, every=2, ema=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(3):
        x = inputs(step + 1)
        twin = copy.deepcopy(spikenm_fx.fold(copy.deepcopy(model)))
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    currents: dict[str, Tensor] = {}
    twin.features[1].register_forward_pre_hook(lambda _, args: currents.update(v=args[0].detach()))
    twin.train()(x)
    conv = model.features[2].module[0].weight.detach() != 0
    assert torch.equal(conv, expected_mask(membranes(currents["v"]), conv.shape, 2, 4))


def test_growth_lets_in_what_the_norm_asks_for() -> None:
    """In the blocks with the largest gradient of gamma the best pruned channel takes a place."""
    model = sparse(method=Activity(growth=0.6, every=1, ema=0.0))
    conv = model.features[2].module[0]
    before = conv.weight.detach() != 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = inputs(5)
    still = spikenm_fx.sparsify(
        spiking(), "2:4", method=Activity(growth=0.0, every=1, ema=0.0), example_inputs=inputs()
    ).train()
    for each in (model, still):
        torch.optim.SGD(each.parameters(), lr=0.0).zero_grad()
        each(x).square().sum().backward()
    gamma = model.features[0].module[1].weight.grad.abs()
    optimizer.step()
    torch.optim.SGD(still.parameters(), lr=0.0).step()
    ranked = still.features[2].module[0].weight.detach() != 0
    grown = conv.weight.detach() != 0
    kept, now = (mask[0, :, 0, 0].view(2, 4) for mask in (ranked, grown))
    gains = gamma.view(2, 4).masked_fill(kept, 0.0)
    for block in range(2):
        came = (now[block] & ~kept[block]).nonzero().flatten().tolist()
        # 60 % of equal blocks: those of the larger gain, for every output and kernel position
        if gains[block].max() > gains[1 - block].max():
            assert came == [int(gains[block].argmax())]
    assert before.shape == grown.shape
    assert int(grown.sum()) == int(ranked.sum())


def test_density_comes_down_and_evaluation_is_n_of_m() -> None:
    """Training starts dense and ends N:M by the cubic schedule; evaluation always is N:M."""
    model = sparse(method=Activity(growth=0.0, every=2, ramp=0.5), total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    layer, counts = model.features[2].module[0], []
    for step in range(20):
        model.train()
        counts.append(most_nonzero(layer.weight, spikenm_fx.NM(2, 4)))
        assert counts[-1] == round(2 + 2 * (1 - min(step / 10, 1)) ** 3)
        optimizer.zero_grad()
        model(inputs(step)).sum().backward()
        optimizer.step()
        model.eval()
        assert most_nonzero(layer.weight, spikenm_fx.NM(2, 4)) == 2
    assert counts[0] == 4
    assert counts[-1] == 2


def test_checkpoints_hold_the_importance() -> None:
    """A resumed run ends with the same bits."""
    method = Activity(every=2)
    models = [sparse(method=method, total_steps=12) for _ in range(2)]

    def train(model: nn.Module, steps: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in steps:
            optimizer.zero_grad()
            model.train()(inputs(step)).square().sum().backward()
            optimizer.step()

    train(models[0], range(6))
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    for model in models:
        train(model, range(6, 9))
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key


def test_weighted_ranks_differ_between_outputs() -> None:
    """|W| times activity: each output channel keeps its own inputs."""
    plain, weighted = (
        sparse(method=Activity(growth=0.0, weighted=w)).features[2].module[0].weight.detach() != 0
        for w in (False, True)
    )
    assert (plain == plain[:1]).all()
    assert not (weighted == weighted[:1]).all()


def test_a_framework_s_own_neurons() -> None:
    """SpikingJelly's LIF, stepped in a loop over time, tells its rule: masks by its membranes."""
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(8, 8),
        neuron.LIFNode(tau=2.0),
        layer.Linear(8, 8),
        neuron.LIFNode(tau=2.0),
        layer.Linear(8, 4),
    )
    functional.set_step_mode(net, "m")
    x = 3 * torch.rand(T, BATCH, 8)
    currents = net[0](x).detach()
    model = spikenm_fx.sparsify(net, "2:4", method=Activity(growth=0.0), example_inputs=x)
    functional.reset_net(model)
    mask = model[2].weight.detach() != 0
    assert torch.equal(mask, expected_mask(membranes(currents), mask.shape, 2, 4))


BAD = {
    "no examples": (
        lambda: spikenm_fx.sparsify(spiking(), method="activity"),
        "needs example_inputs",
    ),
    "no norms": (
        lambda: spikenm_fx.sparsify(
            spiking(norm=False), method="activity", example_inputs=inputs()
        ),
        r"no norm follows .*features.0.module.0.*Activity\(growth=0.0\)",
    ),
    "unknown neurons": (
        lambda: spikenm_fx.sparsify(
            network(), method="activity", example_inputs=torch.randn(2, 8), rules=ALL_LAYERS
        ),
        "update rule is not known: tell it by spikenm_fx.trace.register_neuron",
    ),
    "no neurons": (
        lambda: spikenm_fx.sparsify(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
            method="activity",
            example_inputs=torch.randn(2, 8),
            rules=ALL_LAYERS,
        ),
        "none feeds",
    ),
    "one epoch only": (
        lambda: sparse(method=Activity(every=20), total_steps=20),
        "ends before activity is measured a second time",
    ),
    "negative growth": (lambda: Activity(growth=-0.1), "shares must be in"),
    "never": (lambda: Activity(every=0), "every >= 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_training(case: str) -> None:
    """With what was seen, what is required, and what to do."""
    run, text = BAD[case]
    with pytest.raises(PlanError, match=text):
        run()


def test_the_structured_form_keeps_the_most_active_channels() -> None:
    """Removal by membranes: a fifth of each group's channels stays, those of the largest |V|."""
    model, dense = spiking().eval(), spiking().eval()
    first = membranes(received(spiking(), inputs())["features.1"])
    removal = spikenm_fx.remove_channels(model, inputs(), keep=0.25, score="membrane")
    best = sorted(sorted(range(8), key=lambda i: -first[i])[:2])
    kept = model.features[0].module[0].weight.detach()
    assert torch.equal(kept, dense.features[0].module[0].weight.detach()[best])
    assert removal.removed
    assert model(inputs()).shape == dense(inputs()).shape
    unknown = SpikingConvNet((8, 8), (1,), inputs=3, size=4, hidden=8).eval()
    with pytest.raises(PlanError, match="score='membrane' needs the update rule"):
        spikenm_fx.remove_channels(unknown, inputs(), score="membrane")
