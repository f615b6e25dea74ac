# SPDX-License-Identifier: Apache-2.0
"""One optimizer step is one step of the masks: whatever optimizer, loop and looks in between."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import (
    OPTIMIZERS,
    SAM,
    Lookahead,
    any_moved,
    close,
    dense,
    final_masks,
    heard,
    logits,
    masked_modules,
    masks,
    optimizer_of,
    refused,
    same,
    sequences,
    sparse,
    sparse_spiking,
    step_of,
    train,
    train_step,
    twin,
)
from profiles import tries
from strategies import batches, network
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import SpikeNMError
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

# -- counting -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("extra", [0, 2], ids=["", "extra forwards"])
def test_every_optimizer_steps_the_masks_once(name: str, extra: int) -> None:
    """One step each, masks and logits move, the masks hold still between two steps."""
    model = sparse()
    optimizer, first = optimizer_of(name, model), logits(model)
    for step, x in enumerate(batches(4)):
        optimizer.zero_grad()
        before, weights = masks(model), dense(model)
        model(x).square().sum().backward()
        for _ in range(extra):  # e.g. to log the training accuracy before the step
            model(x)
        assert step_of(model) == step
        assert same(before, masks(model))
        optimizer.step()
        for _ in range(extra):
            model(x)
        assert step_of(model) == step + 1
        assert not same(before, masks(model))
        for layer_name, layer in masked_modules(model).items():
            used, behind = layer.weight.detach(), layer.weight_dense.detach()
            assert torch.equal(used[used != 0], behind[used != 0])
            assert not torch.equal(behind, weights[layer_name])
    assert any_moved(first, logits(model)), "masks are learnt with every optimizer"


def _report(model: nn.Module) -> None:
    spikenm_fx.report(model, batches(1))


def _pickle(model: nn.Module) -> None:
    assert step_of(pickle.loads(pickle.dumps(model))) == step_of(model)


def _deepcopy(model: nn.Module) -> None:
    assert step_of(twin(model)) == step_of(model)


def _reload(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict())


def _evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(batches(1)[0])
    model.train()


def _calibrate(model: nn.Module) -> None:
    with torch.no_grad():
        model(batches(1, size=32)[0])


def _gradient(model: nn.Module) -> None:
    learning = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(model(batches(1)[0]).sum(), learning, allow_unused=True)


def _functional(model: nn.Module) -> None:
    lent = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.func.functional_call(model, lent, (batches(1)[0],))


LOOKS: dict[str, Callable[[nn.Module], object]] = {
    "report": _report,
    "verify": spikenm_fx.verify,
    "state_dict": nn.Module.state_dict,
    "dense_state_dict": spikenm_fx.dense_state_dict,
    "progress": spikenm_fx.progress,
    "deepcopy": _deepcopy,
    "pickle": _pickle,
    "reload": _reload,
    "evaluation": _evaluate,
    "forward without gradients": _calibrate,
    "gradients of something else": _gradient,
    "functional_call": _functional,
    "trace": lambda model: spikenm_fx.trace(model, batches(1)[0]),
    "repr": repr,
}


@tries(15)
@given(
    st.sampled_from(["SGD", "Adam", "Adam, fused", "through .data"]),
    st.lists(st.lists(st.sampled_from(sorted(LOOKS)), max_size=3), min_size=4, max_size=4),
    st.lists(st.lists(st.sampled_from(sorted(LOOKS)), max_size=3), min_size=4, max_size=4),
)
def test_looking_changes_nothing(name: str, between: list, after: list) -> None:
    """Whatever is asked of the model in the middle or at the end of a step, the run is the same."""
    watched, plain = sparse(total_steps=5), sparse(total_steps=5)
    optimizers = [optimizer_of(name, model) for model in (watched, plain)]
    for step, x in enumerate(batches(4)):
        for model, optimizer in zip((watched, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            for look in between[step] if model is watched else ():
                if look not in ("reload", "report"):  # they write to what backward reads
                    LOOKS[look](model)
            loss.backward()
            optimizer.step()
            for look in after[step] if model is watched else ():
                LOOKS[look](model)
        assert step_of(watched) == step_of(plain) == step + 1
    assert same(watched.state_dict(), plain.state_dict())
    assert same(masks(watched), masks(plain))


@pytest.mark.parametrize("how", ["closure", "two calls", "by hand"])
def test_sharpness_aware_minimisation(how: str) -> None:
    """Two passes, one step: both see one mask, also where an optimizer sits in another."""
    model = sparse(total_steps=20)
    sam = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    plain = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, x in enumerate(batches(5)):
        seen = []

        def closure(x: Tensor = x, seen: list = seen) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            seen.append(masks(model))
            return loss

        model.zero_grad()
        closure()
        if how == "closure":
            sam.step(closure)
        elif how == "two calls":
            sam.first_step(zero_grad=True)
            closure()
            sam.second_step()
        else:
            shifts = [None if p.grad is None else 0.05 * p.grad for p in model.parameters()]
            with torch.no_grad():
                for p, shift in zip(model.parameters(), shifts, strict=True):
                    p.add_(0 if shift is None else shift)
            model.zero_grad()
            closure()
            with torch.no_grad():
                for p, shift in zip(model.parameters(), shifts, strict=True):
                    p.sub_(0 if shift is None else shift)
            plain.step()
        assert same(*seen)
        assert step_of(model) == step + 1
        assert not same(seen[0], masks(model))


def test_sam_learns_from_its_second_pass() -> None:
    """Logits and decay come of the gradient that the base optimizer sees, once."""
    (one, other), x = (sparse(), sparse()), batches(1)[0]
    sam = SAM(one.parameters(), torch.optim.SGD, rho=0.0, lr=0.01)
    one(x).square().mean().backward()
    sam.step(lambda: one(x).square().mean().backward())
    train_step(other, torch.optim.SGD(other.parameters(), lr=0.01), x)
    close(dense(one), dense(other))
    close(logits(one), logits(other))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None) -> None:
    """Many evaluations, one step, one mask; the logits move, or it is said that they do not."""
    model, x = sparse(total_steps=20), batches(1)[0]
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.01, max_iter=4, line_search_fn=line_search
    )
    first = logits(model)
    with heard() as said:
        for step in range(3):
            seen = []

            def closure(seen: list = seen) -> Tensor:
                optimizer.zero_grad()
                loss = (model(x) - 1).square().mean()
                loss.backward()
                seen.append(masks(model))
                return loss

            optimizer.step(closure)
            assert len(seen) > 1
            assert all(same(seen[0], mask) for mask in seen)
            assert step_of(model) == step + 1
            assert not same(seen[0], masks(model))
    assert any_moved(first, logits(model)) or any("LBFGS" in text for text in said)
    assert len(said) <= 1


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_closures(name: str) -> None:
    """A step by closure, as Lightning makes each, is the step without: same weights and logits."""
    with_closure, without = sparse(), sparse()
    optimizers = [optimizer_of(name, model) for model in (with_closure, without)]
    for x in batches(3):

        def closure(x: Tensor = x) -> Tensor:
            optimizers[0].zero_grad()
            loss = with_closure(x).square().mean()
            loss.backward()
            return loss

        optimizers[0].step(closure)
        train_step(without, optimizers[1], x)
        assert step_of(with_closure) == step_of(without)
    close(logits(with_closure), logits(without))
    close(dense(with_closure), dense(without))


def test_lookahead() -> None:
    """The slow weights are no step of their own, and evaluation is of the weights written."""
    model = sparse()
    optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=0.05))
    for step, x in enumerate(batches(5)):
        train_step(model, optimizer, x)
        assert step_of(model) == step + 1
    other = sparse(seed=3)
    other.load_state_dict(model.state_dict())
    assert same(final_masks(model), final_masks(other))


@pytest.mark.parametrize("write", ["between", "after"])
def test_weights_written_by_hand_are_no_step(write: str) -> None:
    """Clamping, decaying or noising parameters, with or without .data, never counts."""
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, x in enumerate(batches(3)):
        train_step(model, optimizer, x)
        model(x) if write == "between" else None
        for parameter in model.parameters():
            parameter.data.clamp_(-0.5, 0.5)
            with torch.no_grad():
                parameter.mul_(0.999)
        seen = masks(model)
        model(x)
        assert step_of(model) == step + 1
        assert same(seen, masks(model))


def test_an_optimizer_of_something_else_is_no_step() -> None:
    """Only an optimizer that holds a weight of the model advances its masks."""
    model, other = sparse(), network(seed=4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = masks(model)
    for x in batches(3):
        other.zero_grad()
        (model(x).detach() - other(x)).square().mean().backward()
        optimizer.step()
    assert step_of(model) == 0
    assert same(before, masks(model))


def test_two_models_keep_apart() -> None:
    """Teacher and student, both sparse: each counts its own steps."""
    models = [sparse(), sparse(seed=1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    for x in batches(3):
        train_step(models[0], optimizers[0], x)
    train_step(models[1], optimizers[1], batches(1)[0])
    assert [step_of(model) for model in models] == [3, 1]


def test_one_optimizer_for_two_models() -> None:
    """A joint step is a step of both, and equals the steps of two optimizers."""
    joint, apart = [sparse(), sparse(seed=1)], [sparse(), sparse(seed=1)]
    one = torch.optim.SGD([p for model in joint for p in model.parameters()], lr=0.01)
    for x in batches(3):
        one.zero_grad()
        sum(model(x).square().mean() for model in joint).backward()
        one.step()
    for model in apart:
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), batches(3))
    for a, b in zip(joint, apart, strict=True):
        assert same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("held", ["optimizer first", "model first"])
def test_models_and_optimizers_are_let_go(held: str) -> None:
    """No hook of ours keeps a model or an optimizer alive."""
    import gc
    import weakref

    model = sparse()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, batches(2))
    gone = weakref.ref(model[2]), weakref.ref(optimizer)
    if held == "optimizer first":
        del optimizer, model
    else:
        del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_nothing_of_a_folded_model_steps() -> None:
    """After fold an optimizer that goes on leaves no trace of us, and says nothing."""
    model, plain = sparse(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, batches(2))
    spikenm_fx.fold(model)
    plain.load_state_dict(model.state_dict())
    kept = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, kept, batches(2, seed=5))
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.01), batches(2, seed=5))
    assert same(model.state_dict(), plain.state_dict())
    with pytest.raises(SpikeNMError, match="sparsify"):
        spikenm_fx.progress(model)


# -- what does not count --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "SGD, fused", "Adam", "Adam, fused", "AdamW, fused"])
def test_a_step_that_the_scaler_skips(name: str) -> None:
    """Infinite gradients: no step, no mask, no logit moves; fused optimizers skip inside step."""
    model = sparse()
    optimizer = optimizer_of(name, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = 0
    for number, x in enumerate(batches(4)):
        optimizer.zero_grad()
        loss = model(x).square().sum() * (float("inf") if number % 2 else 1.0)
        before = masks(model), logits(model), dense(model)
        scaler.scale(loss).backward()
        with heard():  # that gradients were not finite
            scaler.step(optimizer)
        scaler.update()
        taken += not number % 2
        assert step_of(model) == taken
        after = masks(model), logits(model), dense(model)
        assert all(same(*pair) == bool(number % 2) for pair in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [8.0, 2.0**16])
@pytest.mark.parametrize("name", ["SGD", "SGD, fused", "Adam", "Adam, fused"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscale_"])
def test_the_loss_scale_drops_out(name: str, scale: float, unscaled: bool) -> None:
    """Weights, their decay included, and logits move as without a scaler."""
    method = SpikeNM(decay=0.05, eid=EID(every=2, weight=(0.5, 0.5)))
    scaled, plain = (sparse_spiking(method=method) for _ in range(2))
    optimizers = [optimizer_of(name, model) for model in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    for x in sequences(3):
        optimizers[0].zero_grad()
        scaler.scale(scaled(x).square().mean()).backward()
        if unscaled:
            scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.update()
        train_step(plain, optimizers[1], x)
    assert step_of(scaled) == 3
    close(dense(scaled), dense(plain), rtol=1e-4, atol=1e-6)
    close(logits(scaled), logits(plain), rtol=1e-4, atol=1e-6)
    assert same(masks(scaled), masks(plain))


@tries(8)
@given(st.sampled_from([2, 4, 16]), st.sampled_from(["SGD", "Adam"]))
def test_micro_batches_are_one_batch(parts: int, name: str) -> None:
    """Summed over micro-batches, weights and logits move as with the whole batch, EID on."""
    eid = EID(every=2, weight=(0.5, 0.5))
    split, whole = (sparse_spiking(method=SpikeNM(decay=0.05, eid=eid)) for _ in range(2))
    optimizers = [optimizer_of(name, model) for model in (split, whole)]
    for x in sequences(4, size=2):
        optimizers[0].zero_grad()
        for _ in range(parts):  # all alike, so that each has the credits of the whole
            (split(x).square().mean() / parts).backward()
        optimizers[0].step()
        train_step(whole, optimizers[1], x.repeat(1, parts, 1))
    assert step_of(split) == step_of(whole) == 4
    close(dense(split), dense(whole), rtol=1e-3, atol=1e-4)
    close(logits(split), logits(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_maximising_the_negative_is_minimising(name: str, maximize: bool) -> None:
    """Logits follow the objective and undrawn weights decay, whichever way it is written."""
    kind = getattr(torch.optim, name)
    models = [sparse(method=SpikeNM(decay=0.05, eid=None)) for _ in range(2)]
    signs = (-1.0, 1.0) if maximize else (1.0, 1.0)
    for model, sign in zip(models, signs, strict=True):
        optimizer = kind(model.parameters(), lr=0.01, maximize=sign < 0)
        for x in batches(3):
            optimizer.zero_grad()
            (sign * model(x).square().mean()).backward()
            optimizer.step()
    close(dense(models[0]), dense(models[1]), rtol=1e-4, atol=1e-6)
    close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", ["norm", "value", "norm inside a pre-hook"])
def test_clipped_gradients_are_what_counts(clip: str) -> None:
    """A user's clipping, in the loop or in a hook of the optimizer, changes logits and weights."""
    clipped, plain = sparse(), sparse()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (clipped, plain)]
    parameters = list(clipped.parameters())

    def shrink(*_: object) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e-8)

    if clip == "norm inside a pre-hook":
        optimizers[0].register_step_pre_hook(shrink)
    x = batches(1)[0]
    before = dense(clipped)
    for model, optimizer in zip((clipped, plain), optimizers, strict=True):
        model(x).square().mean().backward()
        if model is clipped and clip != "norm inside a pre-hook":
            shrink() if clip == "norm" else torch.nn.utils.clip_grad_value_(parameters, 1e-9)
        with heard():
            optimizer.step()
    moved = {k: (v - before[k]).norm() for k, v in dense(clipped).items()}
    free = {k: (v - before[k]).norm() for k, v in dense(plain).items()}
    assert all(moved[k] < 0.2 * free[k] for k in moved)
    assert step_of(clipped) == 1


# -- without an optimizer of torch ----------------------------------------------------------------


def by_hand(model: nn.Module, x: Tensor) -> None:
    """Plain gradient descent, as tutorials write it."""
    model.zero_grad()
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad


def test_loops_without_an_optimizer() -> None:
    """``spikenm_fx.step(model)`` after each update does what an optimizer's step does."""
    model, other = sparse(), sparse()
    first, optimizer = logits(model), torch.optim.SGD(other.parameters(), lr=0.01)
    for step, x in enumerate(batches(4)):
        before = masks(model)
        by_hand(model, x)
        assert same(before, masks(model))
        spikenm_fx.step(model)
        assert step_of(model) == step + 1
        assert not same(before, masks(model))
        train_step(other, optimizer, x)
    assert any_moved(first, logits(model))
    assert step_of(other) == 4


def test_loops_without_an_optimizer_and_without_step_are_told_once() -> None:
    """Training that no optimizer and no ``step`` tells of keeps its first masks: one warning."""
    model = sparse()
    with heard() as said:
        for x in batches(100):
            by_hand(model, x)
    assert len(said) == 1
    assert "spikenm_fx.step" in said[0]
    assert step_of(model) == 0


def test_step_refuses_what_has_no_masks() -> None:
    """A dense model, or something else, has no step to make."""
    for wrong in (network(), torch.zeros(3), None):
        for verb in (spikenm_fx.step, spikenm_fx.progress):
            with pytest.raises(SpikeNMError):
                verb(wrong)  # type: ignore[arg-type]


def test_gradients_made_elsewhere() -> None:
    """Gradients that functional calls made and somebody put into ``.grad``: it is one step."""
    model, plain = (sparse(method=SpikeNM(eid=None)) for _ in range(2))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, plain)]
    for step, x in enumerate(batches(3)):
        lent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        torch.func.functional_call(model, lent, x).square().mean().backward()
        for name, parameter in model.named_parameters():
            parameter.grad = lent[name].grad
        optimizers[0].step()
        train_step(plain, optimizers[1], x)
        assert step_of(model) == step + 1
    close(logits(model), logits(plain))
    close(dense(model), dense(plain))


def test_optimizers_inside_backward() -> None:
    """An optimizer for each parameter that steps while backward runs: exact, or it says so."""
    model = sparse()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters() if p.requires_grad}

    def stepped(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(stepped)

    def run() -> None:
        for x in batches(4):
            model(x).square().mean().backward()

    error = refused(run, RuntimeError)
    assert step_of(model) == 4 if error is None else "backward" in error


# -- several optimizers, changed optimizers -------------------------------------------------------


def test_optimizers_for_layers_of_their_own() -> None:
    """Each holding other layers, all stepped in each iteration: one step a round, or it is said."""
    model = sparse()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.01) for i in (0, 2, 4)]
    with heard() as said:
        for x in batches(4):
            model.zero_grad()
            model(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert step_of(model) == 4 or said
    spikenm_fx.verify(model).raise_if_invalid()


@pytest.mark.parametrize("backward", ["one", "two"])
def test_two_optimizers_of_the_same_weights(backward: str) -> None:
    """Each step of either counts; that both step on one and the same gradient is told, once."""
    model, other = sparse(), sparse()
    pair = [torch.optim.SGD(model.parameters(), lr=0.01) for _ in range(2)]
    single = torch.optim.SGD(other.parameters(), lr=0.01)
    with heard() as said:
        for x in batches(3):
            for optimizer in pair:
                if backward == "two" or optimizer is pair[0]:
                    model.zero_grad()
                    model(x).square().mean().backward()
                optimizer.step()
    assert step_of(model) == 6
    spikenm_fx.verify(model).raise_if_invalid()
    if backward == "one":
        (text,) = said
        assert "two optimizers" in text
        assert "total_steps" in text
        return
    assert not said
    train(other, single, [x for x in batches(3) for _ in range(2)])
    close(dense(model), dense(other), rtol=0, atol=0)
    close(logits(model), logits(other), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["before sparsify", "filtered", "matrices", "named", "rebuilt"])
def test_no_way_of_building_the_optimizer_loses_the_masks(how: str) -> None:
    """Whoever filters parameters or builds the optimizer early: masks learn, or it is said."""
    model = network()
    early = list(model.parameters())
    if how == "before sparsify":
        optimizer = torch.optim.Adam(early, lr=0.01)
    spikenm_fx.sparsify(model, "2:4")
    if how == "filtered":
        wanted = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(wanted, lr=0.01)
    elif how == "matrices":
        wanted = [p for p in model.parameters() if p.dim() == 2]
        optimizer = torch.optim.Adam(wanted, lr=0.01)
    elif how == "named":  # as weight-decay rules do
        named = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in named.items() if n.endswith("weight")]},
                {"params": [p for n, p in named.items() if n.endswith("bias")]},
            ],
            lr=0.01,
        )
    elif how == "rebuilt":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        train_step(model, optimizer, batches(1)[0])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first, start = logits(model), step_of(model)
    with heard() as said:
        train(model, optimizer, batches(6))
    assert step_of(model) == start + 6
    assert any_moved(first, logits(model)) or len(said) == 1


def test_param_groups_train() -> None:
    """Groups of ours learn masks without weight decay on logits, in one optimizer or in two."""
    one, two = sparse(), sparse()
    groups = spikenm_fx.param_groups(one, 0.01, weight_decay=0.1)
    assert {id(p) for g in groups for p in g["params"]} <= {id(p) for p in one.parameters()}
    train(one, torch.optim.SGD(groups, lr=0.01), batches(3))
    parts = [g for g in spikenm_fx.param_groups(two, 0.01, weight_decay=0.1) if g["params"]]
    optimizers = [torch.optim.SGD([group], lr=0.01) for group in parts]
    for x in batches(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        two(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert step_of(one) == step_of(two) == 3
    close(dense(one), dense(two))
    close(logits(one), logits(two))


def test_a_state_dict_of_the_optimizer_resumes() -> None:
    """Model and optimizer through disk in the middle: the same bits as without a stop."""
    data = sequences(8)
    whole, head = (sparse_spiking(total_steps=8) for _ in range(2))
    train(whole, torch.optim.Adam(whole.parameters(), lr=0.01), data)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    train(head, optimizer, data[:4])
    disk = io.BytesIO()
    torch.save((head.state_dict(), optimizer.state_dict()), disk)
    disk.seek(0)
    tail = sparse_spiking(total_steps=8)
    states = torch.load(disk, weights_only=True)
    optimizer = torch.optim.Adam(tail.parameters(), lr=0.01)
    tail.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    assert step_of(tail) == 4
    train(tail, optimizer, data[4:])
    assert same(tail.state_dict(), whole.state_dict())


# -- bad steps ------------------------------------------------------------------------------------


def test_a_step_without_backward() -> None:
    """No gradient anywhere: nothing is learnt, nothing fails, whatever is counted is monotonic."""
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = logits(model), dense(model)
    with heard() as said:
        for _ in range(3):
            optimizer.step()
    assert same(before[0], logits(model))
    assert same(before[1], dense(model))
    assert step_of(model) in (0, 3) or said
    train(model, optimizer, batches(2))
    spikenm_fx.verify(model).raise_if_invalid()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("eid", [True, False], ids=["EID", ""])
def test_gradients_that_are_not_finite(value: float, eid: bool) -> None:
    """One warning; logits stay as they were and masks stay N:M, so that training can go on."""
    model = sparse(method=SpikeNM(eid=EID(every=1) if eid else None))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, batches(1))
    before, weights = logits(model), dense(model)
    with heard() as said:
        for x in batches(2):
            optimizer.zero_grad()
            (model(x).square().mean() * value).backward()
            optimizer.step()
            with torch.no_grad():  # as a loop that restores what diverged
                for name, weight in weights.items():
                    model.get_submodule(name).weight_dense.copy_(weight)
                for parameter in model.parameters():
                    parameter.nan_to_num_(0.0, 0.0, 0.0)
    assert len(said) == 1
    assert "finite" in said[0] or "NaN" in said[0]
    assert same(before, logits(model))
    train(model, optimizer, batches(2))
    assert all(bool(torch.isfinite(value).all()) for value in logits(model).values())
    spikenm_fx.verify(model).raise_if_invalid()


def test_a_pre_hook_that_replaces_gradients() -> None:
    """A user's hook may swap ``.grad``: weights follow the new one, and steps are exact.

    Logits learn from what was there before, as hooks of all optimizers run before those of one.
    """
    model, other = sparse(), sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def replaced(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = torch.zeros_like(p)

    optimizer.register_step_pre_hook(replaced)
    before = dense(model)
    with heard() as said:
        train(model, optimizer, batches(2))
    assert step_of(model) == 2
    same_but_decay = max(float((dense(model)[k] - before[k]).abs().max()) for k in before)
    assert same_but_decay < 1e-2 or said
    train(other, torch.optim.SGD(other.parameters(), lr=0.0), batches(2))
    assert same(dense(model), dense(other))
    assert same(logits(model), logits(other))
