# SPDX-License-Identifier: Apache-2.0
"""One mask sample per optimizer step, however the forward passes of that step look."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, batches, most_nonzero, network
from torch import nn
from torch.utils.checkpoint import checkpoint

import spikenm_fx
from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.masks.methods.spikenm import SpikeNM


def sparse(**options) -> nn.Module:
    """All three layers at 2:4, with large learning signals."""
    return spikenm_fx.sparsify(network(), "2:4", rules=ALL_LAYERS, **options)


def step_of(model: nn.Module) -> int:
    """Optimizer steps as a checkpoint would store them."""
    return int(model[2].weight_nm[4])


def masks(model: nn.Module) -> list[torch.Tensor]:
    """The masks in use, read off the weights."""
    return [model[i].weight.detach() != 0 for i in (0, 2, 4)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


class DataSGD(torch.optim.Optimizer):
    """An optimizer of the old school: it writes through ``.data`` and raises no version."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "data": DataSGD,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("extra", [0, 2], ids=["plain", "extra forwards"])
def test_each_optimizer_step_counts_once(name, extra):
    """Every optimizer's step is seen once and changes masks; further forwards change nothing."""
    model = sparse()
    optimizer = OPTIMIZERS[name](model.parameters())
    for step, x in enumerate(batches(5)):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        in_use = masks(model)
        for _ in range(extra):  # e.g. to log the training accuracy before the step
            model(x)
        assert step_of(model) == step
        assert same(masks(model), in_use)
        weights = [model[i].weight_dense.detach().clone() for i in (0, 2, 4)]
        optimizer.step()
        model(x)
        assert step_of(model) == step + 1
        assert not same(masks(model), in_use)
        for i, before in zip((0, 2, 4), weights, strict=True):
            used = model[i].weight.detach()
            assert not torch.equal(before, model[i].weight_dense)
            assert torch.equal(used[used != 0], model[i].weight_dense.detach()[used != 0])


def test_shared_by_batch_and_time_loop():
    """A Python loop over T calls the layers T times with one and the same weight tensor."""
    model = sparse()
    optimizer = torch.optim.Adam(model.parameters())
    for x in batches(3):
        used = []
        for _ in range(4):
            model(x)
            used.append(masks(model))
        model(x).sum().backward()
        assert all(same(used[0], other) for other in used)
        optimizer.step()
    assert step_of(model) == 3


@given(st.integers(1, 4), st.integers(1, 3))
def test_gradient_accumulation_shares_the_sample(micro_batches, steps):
    """All micro-batches of a step see one sample; their summed gradients are those of the batch."""
    model = sparse(method=SpikeNM(eid=None))  # EID's pull is bounded, hence no sum over samples
    whole = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, whole)]
    for step in range(steps):
        parts = batches(micro_batches, size=3, seed=step)
        used = []
        for part in parts:
            model(part).square().sum().backward()
            used.append(masks(model))
        whole(torch.cat(parts)).square().sum().backward()
        assert all(same(used[0], other) for other in used)
        assert same(used[0], masks(whole))
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
        whole.load_state_dict(model.state_dict())  # rounding must not part them
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        whole.load_state_dict(model.state_dict())
    assert step_of(model) == steps


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_sees_the_same_sample(reentrant):
    """Recomputation uses the step's masks: gradients equal those without checkpointing."""
    plain, recomputed = sparse(), sparse()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (plain, recomputed)]
    for x in batches(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        x = x.requires_grad_()
        h = 0
        for _ in range(2):  # time
            h = h + checkpoint(recomputed[:3], x, use_reentrant=reentrant)
        recomputed[3:](h).square().sum().backward()
        h = 0
        for _ in range(2):
            h = h + plain[:3](x)
        plain[3:](h).square().sum().backward()
        for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert all(p.grad is not None for p in plain.parameters())
        for optimizer in optimizers:
            optimizer.step()
    assert step_of(plain) == step_of(recomputed) == 3


@pytest.mark.parametrize("name", ["sgd", "adam-fused", "data"])
def test_a_skipped_step_is_no_step(name):
    """A step that the gradient scaler skips (infinite gradients) keeps the sample."""
    model = sparse()
    optimizer = OPTIMIZERS[name](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = 0
    for number, x in enumerate(batches(4)):
        optimizer.zero_grad()
        loss = model(x).square().sum() * (float("inf") if number % 2 else 1.0)
        before = masks(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        taken += not number % 2
        model(x)
        assert step_of(model) == taken
        assert same(before, masks(model)) == bool(number % 2)


def test_two_optimizers_make_one_step():
    """Weights and logits in optimizers of their own: stepping both is one step for the masks."""
    model = sparse()
    weights, logits = spikenm_fx.param_groups(model, 0.1)
    optimizers = [torch.optim.SGD([weights]), torch.optim.Adam([logits])]
    for x in batches(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert step_of(model) == 3


def test_alternating_optimizers_never_split_a_time_loop():
    """Whichever layers an optimizer moves, all T passes after its step use one sample."""
    model = sparse()
    parts = [model[0].parameters(), model[2].parameters(), model[4].parameters()]
    optimizers = [torch.optim.SGD(part, lr=1e-3) for part in parts]
    for number, x in enumerate(batches(9)):
        model.zero_grad()
        loss, used = 0, []
        for _ in range(3):
            loss = loss + model(x).square().sum()
            used.append(masks(model))
        assert same(used[0], used[1])
        assert same(used[0], used[2])
        loss.backward()
        optimizers[(number * 2) % 3].step()
    assert step_of(model) == 9


def test_evaluation_and_no_grad_do_not_count():
    """Forward passes alone, in whatever mode, never advance the step or change the sample."""
    model = sparse()
    x = batches(1)[0]
    model(x)
    before = masks(model)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            model.eval()
            model(x)
            model.train()
            model(x)
    model(x).sum().backward()
    model.state_dict()
    assert step_of(model) == 0
    assert same(before, masks(model))


def test_functional_calls_do_not_count():
    """Parameters lent by functional_call are not an optimizer's work."""
    model = sparse()
    x = batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(x).sum().backward()
    optimizer.step()
    model(x)
    lent = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        torch.func.functional_call(model, lent, x)
        model(x)
    assert step_of(model) == 1


def test_steps_count_where_all_calls_are_functional():
    """Gradients by functional_call, a step on the model's own parameters: it is one step."""
    model = sparse()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step, x in enumerate(batches(4)):
        lent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        torch.func.functional_call(model, lent, x).square().sum().backward()
        for name, parameter in model.named_parameters():
            parameter.grad = lent[name].grad
        assert step_of(model) == step
        optimizer.step()
    assert step_of(model) == 4


def test_lent_weights_take_no_part_in_a_fade():
    """Nobody knows how long functional_call trains them: they are N:M from the start."""
    model = spikenm_fx.sparsify(network(), "1:4", rules=ALL_LAYERS, total_steps=20)
    lent = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = batches(1)[0]
    used = []
    hook = model[2].register_forward_pre_hook(lambda layer, _: used.append(layer.weight))
    torch.func.functional_call(model, lent, x)
    hook.remove()
    assert most_nonzero(used[0], model[2]._nm_mask.view.nm) == 1
    assert most_nonzero(model[2].weight, model[2]._nm_mask.view.nm) > 1


def test_warns_where_functional_training_moves_no_step():
    """Weights trained outside of the model never move its masks: after a while we say so, once."""
    model = sparse()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = batches(1)[0]

    def train(passes):
        nonlocal values
        for _ in range(passes):
            values = {name: v.detach().requires_grad_() for name, v in values.items()}
            torch.func.functional_call(model, values, x).square().mean().backward()
            values = {n: v if v.grad is None else v - 0.01 * v.grad for n, v in values.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("error", SpikeNMWarning)
        train(400)
    with pytest.warns(SpikeNMWarning, match="lent by functional_call") as caught:
        train(400)
    assert len([w for w in caught if w.category is SpikeNMWarning]) == 1
    assert step_of(model) == 0


def test_frozen_layers_follow_the_others():
    """A layer whose weight and logits are frozen is resampled with every step of the others."""
    model = sparse()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    for x in batches(4):
        model(x).square().sum().backward()
        seen.append(masks(model)[0])
        optimizer.step()
    assert step_of(model) == 4
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_freezing_a_layer_midway_splits_no_time_loop():
    """When the layer that told of steps is frozen, the next step is still seen before time runs."""
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number, x in enumerate(batches(6)):
        if number == 3:
            model[0].requires_grad_(False)
        optimizer.zero_grad()
        loss, used = 0, []
        for _ in range(3):
            loss = loss + model(x).square().sum()
            used.append(masks(model))
        assert same(used[0], used[2])
        loss.backward()
        optimizer.step()
    assert step_of(model) == 6


@pytest.mark.parametrize("name", ["sgd", "adam-fused", "data"])
def test_warns_of_logits_that_nobody_updates(name):
    """An optimizer built before sparsify leaves the logits idle: after three steps we say so."""
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    spikenm_fx.sparsify(model, "2:4")

    def train():
        for x in batches(6):
            model(x).square().sum().backward()
            optimizer.step()

    with pytest.warns(SpikeNMWarning, match="build the optimizer after sparsify") as caught:
        train()
    assert len([w for w in caught if w.category is SpikeNMWarning]) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_warning_where_all_is_well(name):
    """No optimizer that updates weights and logits is warned of."""
    model = sparse()
    optimizer = OPTIMIZERS[name](model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpikeNMWarning)
        for x in batches(6):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()


def test_lbfgs_trains():
    """LBFGS, which calls the model several times per step, keeps N:M and counts its steps."""
    model = sparse(total_steps=1)
    x = batches(1)[0]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert step_of(model) >= 2
    assert spikenm_fx.verify(model).valid


@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_masks_stay_frozen(set_to_none):
    """In the frozen part of the schedule momentum cannot move logits, whatever zero_grad does."""
    model = sparse(total_steps=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    frozen, final = [], []
    for step, x in enumerate(batches(14)):
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x).square().sum().backward()
        if step >= 7:
            frozen.append(masks(model))
            final.append(model.state_dict()["2.weight_logits"].clone())
        optimizer.step()
    assert all(same(frozen[0], other) for other in frozen)
    assert all(torch.equal(final[0], other) for other in final)
    model.eval()
    assert same(frozen[0], masks(model))


@pytest.mark.parametrize("how", ["copy", "replace", "module"])
def test_frozen_logits_can_be_written_by_hand(how):
    """Averaged or restored weights are taken as they are: only an optimizer's step is undone."""
    model, other = sparse(total_steps=8), sparse(seed=5, total_steps=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for x in batches(10):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().sum().backward()
        optimizer.step()
    model.eval()
    model(batches(1)[0])  # a validation after the last step
    wanted = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if how == "copy":
                parameter.copy_(wanted[name])
            elif how == "replace":
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, nn.Parameter(wanted[name]))
            else:
                parameter.data = wanted[name].clone()
    for training in (False, True):
        model.train(training)
        model(batches(1)[0])
        state = model.state_dict()
        assert all(torch.equal(state[n], v) for n, v in wanted.items() if n.endswith("_logits"))
    assert not same(masks(model), masks(other))


def test_writing_between_forward_and_backward_is_an_error():
    """Writing to weights before backward would give wrong gradients: refused, as torch does."""
    model = sparse()
    loss = model(batches(1)[0]).square().sum()
    with torch.no_grad():
        model[2].weight_dense.mul_(2)
    with pytest.raises(RuntimeError, match="backward before"):
        loss.backward()
