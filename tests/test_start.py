# SPDX-License-Identifier: Apache-2.0
"""How sparse training starts: with the norm of the dense weights, and with a fade."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from strategies import Case, cases, most_nonzero, network
from torch import nn

import spikenm_fx
from spikenm_fx import Rule, SpikeNMError
from spikenm_fx.masks import MaskedLayer, Schedule
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.masks.methods.srste import SRSTE
from spikenm_fx.masks.update import draw_masks

FADING = SpikeNM(fade=0.5, eid=None)
IN_A_FADE = pytest.mark.filterwarnings("ignore:the model is evaluated at step")
"""Evaluation before a fade has ended is told, which is not what these tests are about."""


def sparse(method, steps: int | None = 20, nm: str = "1:4") -> nn.Module:
    return spikenm_fx.sparsify(network(seed=3), nm, method=method, total_steps=steps)


def layers(model: nn.Module) -> list[MaskedLayer]:
    return [module for module in model.modules() if isinstance(module, MaskedLayer)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    model.train()
    for step in range(start, start + steps):
        x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def shape_of(model: nn.Module) -> tuple[int, ...]:
    first = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    return (first.in_channels, 8, 8) if isinstance(first, nn.Conv2d) else (first.in_features,)


SHAPE = shape_of(network(seed=3))


@given(cases(dtypes=(torch.float32, torch.float64)), st.sampled_from(["2:4", "1:4", "1:8"]))
def test_first_masks_keep_the_norm(case: Case, pattern: str) -> None:
    """The masked weight starts as large as the dense one was, and points the same way."""
    model = case.model()
    before = model[0].weight.detach().clone()
    spikenm_fx.sparsify(model, pattern, remainder="pad", rules=[Rule("0", nm=pattern)])
    model.eval()
    used, dense = model[0].weight.detach(), model[0].weight_dense.detach()
    if not before.any() or not torch.isfinite(before.norm()) or before.norm() < 1e-30:
        return
    kept = used != 0
    factor = dense.double().norm() / before.double().norm()
    torch.testing.assert_close(dense.double(), before.double() * factor, rtol=1e-4, atol=1e-30)
    if factor != 1:
        torch.testing.assert_close(used.double().norm(), before.double().norm(), rtol=1e-3, atol=0)
        assert torch.equal(used[kept], dense[kept])


def test_norm_without_the_means_to_keep_it() -> None:
    """Zero and overflowing weights stay as they are; baselines change nothing."""
    zero = network(seed=3)
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    spikenm_fx.sparsify(zero)
    assert not any(layer.weight_dense.any() for layer in layers(zero))

    huge = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).half()
    with torch.no_grad():
        huge[1].weight.fill_(60_000.0)
    spikenm_fx.sparsify(huge, "1:8", rules=[Rule("1", nm="1:8")])
    assert torch.isfinite(huge[1].weight_dense).all()

    for method in ("magnitude", "srste", "random", "maskllm", SpikeNM(rescale=False)):
        plain, model = network(seed=3), sparse(method)
        for name, module in plain.named_modules():
            other = model.get_submodule(name)
            if isinstance(other, MaskedLayer):
                assert torch.equal(module.weight, other.weight_dense)
    rescaled = layers(sparse(SRSTE(rescale=True)))[0]
    assert not torch.equal(rescaled.weight_dense, layers(sparse("srste"))[0].weight_dense)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("steps", [None, 20], ids=["open", "fade"])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_loading_and_sparsifying_commute(pattern: str, steps: int | None, assign: bool) -> None:
    """Pretrained weights start alike, loaded before sparsify or after; theirs stay untouched."""
    pretrained = network(seed=9).state_dict()
    before = spikenm_fx.sparsify(network(seed=9), pattern, total_steps=steps)
    after = spikenm_fx.sparsify(network(seed=3), pattern, total_steps=steps)
    given = copy.deepcopy(pretrained)
    after.load_state_dict(given, assign=assign)
    for one, other in zip(layers(before), layers(after), strict=True):
        assert torch.equal(one.weight_dense, other.weight_dense)
    assert given.keys() == pretrained.keys()
    assert all(torch.equal(given[key], pretrained[key]) for key in given)


@pytest.mark.parametrize("pattern", ["1:4", "1:8"])
def test_a_fade_starts_from_the_dense_network_itself(pattern: str) -> None:
    """Weights are scaled for the masks alone; the first step of a fade uses all of them."""
    plain, model = network(seed=3), spikenm_fx.sparsify(network(seed=3), pattern, total_steps=20)
    x = torch.rand(2, *SHAPE)
    assert torch.equal(model.train()(x), plain.train()(x))
    strict = spikenm_fx.sparsify(network(seed=3), pattern, method=SpikeNM(fade=0.0), total_steps=20)
    for faded, scaled in zip(layers(model), layers(strict), strict=True):
        assert scaled.weight_dense.norm() > faded.weight_dense.norm()


@IN_A_FADE
@tries(10)
@given(st.sampled_from(["3:8", "1:4", "1:8"]), st.integers(0, 20), st.sampled_from([0.3, 1.0]))
def test_fade(pattern: str, step: int, fade: float) -> None:
    """Undrawn weights are scaled by a factor from 1 to 0; from its end on every step is N:M."""
    model = spikenm_fx.sparsify(
        network(seed=3), pattern, method=SpikeNM(fade=fade, eid=None), total_steps=20
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train(model, optimizer, step)
    search = 20 * 0.85
    expected = max(1 - min(step / search, 1) / fade, 0.0)
    keep = int(pattern[0])
    for layer in layers(model):
        mask = layer._nm_mask.mask
        model.train()
        used, dense = layer.weight.detach(), layer.weight_dense.detach()
        assert torch.equal(used[mask], dense[mask])
        torch.testing.assert_close(used[~mask], dense[~mask] * expected)
        if not expected:
            assert most_nonzero(used, layer._nm_mask.view.nm) <= keep
        model.eval()
        assert most_nonzero(layer.weight.detach(), layer._nm_mask.view.nm) <= keep
    twin = copy.deepcopy(model).eval()
    x = torch.rand(2, *SHAPE)
    before = twin(x)
    assert torch.equal(spikenm_fx.fold(twin)(x), before)
    spikenm_fx.verify(twin, pattern).raise_if_invalid()


@pytest.mark.parametrize("method", [FADING, SpikeNM(fade=0.5, eid=None, decay=None)])
def test_undrawn_weights_learn_in_the_fade(method: SpikeNM) -> None:
    """They move by the dense gradient; without decay, by as much of it as they take part."""
    model, dense = sparse(method), network(seed=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train(model, optimizer, 4)
    optimizer.zero_grad()
    x = torch.rand(2, *SHAPE)
    model(x).square().mean().backward()
    dense.train()
    twins = {}
    for name, module in dense.named_modules():
        if name and not list(module.children()):
            layer = model.get_submodule(name)
            for key, parameter in module.named_parameters():
                parameter.data.copy_(getattr(layer, key))
            if isinstance(layer, MaskedLayer):
                twins[name] = layer, module
    dense(x).square().mean().backward()
    masks = {name: layer._nm_mask.mask.clone() for name, (layer, _) in twins.items()}
    before = {
        name: (layer.weight_dense.detach().clone(), layer.weight_logits.detach().clone())
        for name, (layer, _) in twins.items()
    }
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    for name, (layer, module) in twins.items():
        undrawn, (weight, logits) = ~masks[name], before[name]
        share = 1 - 4 / 17 / 0.5 if method.decay is None else 1.0
        learnt = (weight - layer.weight_dense.detach())[undrawn]
        if method.decay:
            learnt = learnt - method.decay * weight[undrawn]
        torch.testing.assert_close(
            learnt, module.weight.grad[undrawn] * share, rtol=1e-4, atol=1e-7
        )
        assert learnt.any()
        assert not torch.equal(layer.weight_logits, logits)


def test_resuming_within_the_fade_is_bit_exact() -> None:
    """A run that stops in the fade goes on as if it had not stopped."""
    whole, first, second = (sparse(FADING) for _ in range(3))
    make = lambda model: torch.optim.Adam(model.parameters(), 0.01)  # noqa: E731
    train(whole, make(whole), 12)
    optimizer = make(first)
    train(first, optimizer, 5)
    resumed = make(second)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, resumed, 7, start=5)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fade", [-0.1, 1.1, float("nan")])
def test_bad_fades(fade: float) -> None:
    """Outside of [0, 1], or without a known end."""
    with pytest.raises(SpikeNMError, match="fade"):
        Schedule(10, fade=fade)
    with pytest.raises(SpikeNMError, match="fade"):
        Schedule(None, fade=0.5)


def test_open_runs_do_not_fade() -> None:
    """Without total_steps nobody knows when the fade would end: every step is N:M."""
    model = sparse(FADING, None)
    model.train()
    for layer in layers(model):
        assert most_nonzero(layer.weight.detach(), layer._nm_mask.view.nm) <= 1


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:4"])
def test_where_half_is_kept_every_step_is_sparse(pattern: str) -> None:
    """At 2:4 a fade gains nothing: training is N:M from the first step, beside layers that fade."""
    rules = [Rule("2", nm=pattern), Rule("4", nm="1:8")]
    model = spikenm_fx.sparsify(network(seed=3), pattern, rules=rules, total_steps=20).train()
    strict, faded = model[2], model[4]
    assert most_nonzero(faded.weight, faded._nm_mask.view.nm) == 8
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(20):
        assert most_nonzero(strict.weight, strict._nm_mask.view.nm) <= int(pattern[0])
        train(model, optimizer, 1, start=step)
    assert most_nonzero(faded.weight, faded._nm_mask.view.nm) == 1


def test_the_scale_of_the_logits_does_not_matter() -> None:
    """Kappa is counted in the logits' own spread: ten times the logits draw the same masks."""
    model, larger, fixed = sparse("spikenm"), sparse("spikenm"), sparse(SpikeNM(relative=False))
    for one, other, plain in zip(*map(layers, (model, larger, fixed)), strict=True):
        with torch.no_grad():
            other.weight_logits.mul_(10.0)
        for layer in (one, other, plain):
            draw_masks([layer._nm_mask], 3)
        kappas = [float(layer._nm_mask.draw(3).kappa) for layer in (one, other, plain)]
        assert kappas[0] == pytest.approx(10 * kappas[1], rel=1e-5)
        assert kappas[2] == pytest.approx(plain._nm_mask.schedule.kappa_at(3))
        assert torch.equal(one._nm_mask.mask, other._nm_mask.mask)
        with torch.no_grad():
            other.weight_logits.zero_()
        draw_masks([other._nm_mask], 3)  # no spread to divide by
        assert most_nonzero(other._nm_mask.mask, other._nm_mask.view.nm) == 1


@IN_A_FADE
@pytest.mark.parametrize("method", ["spikenm", SRSTE(fade=0.6)], ids=["spikenm", "srste"])
def test_fades_where_the_end_is_known(method: str | SRSTE) -> None:
    """Dense at the first step, N:M in training before the run ends; in evaluation always."""
    model = sparse(method, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    counts = []
    for step in range(10):
        model.eval()
        assert spikenm_fx.verify(model, "1:4").valid
        model.train()
        counts.append([most_nonzero(m.weight, m._nm_mask.view.nm) for m in layers(model)])
        train(model, optimizer, 1, start=step)
    assert counts[0] == [4] * len(counts[0])
    assert counts[-1] == [1] * len(counts[0])
