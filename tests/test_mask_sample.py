# SPDX-License-Identifier: Apache-2.0
"""One mask sample per optimizer step, however the forward passes of that step look."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import final_masks, heard, logits, masks, same, sparse, step_of, train
from strategies import batches, most_nonzero
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spikenm_fx
from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.masks.methods.spikenm import SpikeNM


def test_shared_by_batch_and_time_loop() -> None:
    """A Python loop over T calls the layers T times with one and the same mask."""
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
def test_gradient_accumulation_shares_the_sample(micro_batches: int, steps: int) -> None:
    """All micro-batches of a step see one sample; their summed gradients are those of the batch."""
    model = sparse(method=SpikeNM(eid=None))
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
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for (key, a), b in zip(logits(model).items(), logits(whole).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=key)
        whole.load_state_dict(model.state_dict())  # rounding must not part them
    assert step_of(model) == steps


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_sees_the_same_sample(reentrant: bool) -> None:
    """Recomputation uses the step's masks: gradients equal those without checkpointing."""
    plain, recomputed = (sparse(method=SpikeNM(eid=None)) for _ in range(2))
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (plain, recomputed)]
    for x in batches(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        x = x.requires_grad_()
        h: Tensor | int = 0
        for _ in range(2):  # time
            h = h + checkpoint(recomputed[:3], x, use_reentrant=reentrant)
        recomputed[3:](h).square().sum().backward()
        h = 0
        for _ in range(2):
            h = h + plain[:3](x)
        plain[3:](h).square().sum().backward()
        learning = [p for p in plain.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in learning)
        for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert step_of(plain) == step_of(recomputed) == 3
    assert same(logits(plain), logits(recomputed))


def test_alternating_optimizers_never_split_a_time_loop() -> None:
    """Whichever layers an optimizer moves, all T passes after its step use one sample."""
    model = sparse()
    parts = [model[0].parameters(), model[2].parameters(), model[4].parameters()]
    optimizers = [torch.optim.SGD(part, lr=1e-3) for part in parts]
    with heard() as said:
        for number, x in enumerate(batches(9)):
            model.zero_grad()
            loss, used = torch.zeros(()), []
            for _ in range(3):
                loss = loss + model(x).square().sum()
                used.append(masks(model))
            assert same(used[0], used[1])
            assert same(used[0], used[2])
            loss.backward()
            optimizers[(number * 2) % 3].step()
    assert step_of(model) == 9 or said


def test_evaluation_and_no_grad_do_not_count() -> None:
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


def test_functional_calls_do_not_count() -> None:
    """Parameters lent by functional_call are not an optimizer's work."""
    model = sparse()
    x = batches(1)[0]
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), [x])
    lent = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        torch.func.functional_call(model, lent, (x,))
        model(x)
    assert step_of(model) == 1


def test_lent_weights_are_used_as_the_models_own() -> None:
    """functional_call with the model's own values computes what the model computes."""
    model = sparse(total_steps=20)
    x = batches(1)[0]
    for _ in range(3):
        lent = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert torch.equal(torch.func.functional_call(model, lent, (x,)), model(x))
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), [x])


def test_lent_weights_take_no_part_in_a_fade() -> None:
    """Nobody knows how long functional_call trains them: they are N:M from the start."""
    model, nm = sparse("1:4", total_steps=20), spikenm_fx.NM(1, 4)
    lent = {name: p.detach().clone() for name, p in model.named_parameters()}
    used: list[Tensor] = []
    hook = model[2].register_forward_pre_hook(lambda layer, _: used.append(layer.weight))
    torch.func.functional_call(model, lent, (batches(1)[0],))
    hook.remove()
    assert most_nonzero(used[0], nm) == 1
    assert most_nonzero(model[2].weight, nm) > 1


def test_warns_where_functional_training_moves_no_step() -> None:
    """Weights trained outside of the model never move its masks: after a while we say so, once."""
    model = sparse()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = batches(1)[0]

    def run(passes: int) -> None:
        nonlocal values
        for _ in range(passes):
            values = {name: v.detach().requires_grad_() for name, v in values.items()}
            torch.func.functional_call(model, values, (x,)).square().mean().backward()
            values = {n: v if v.grad is None else v - 0.01 * v.grad for n, v in values.items()}

    with pytest.warns(SpikeNMWarning, match=r"spikenm_fx\.step") as caught:
        run(800)
    assert len([w for w in caught if w.category is SpikeNMWarning]) == 1
    assert step_of(model) == 0


def test_frozen_layers_follow_the_others() -> None:
    """A layer whose weight is frozen is resampled with every step of the others, or it is said."""
    model = sparse()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    with heard() as said:
        for x in batches(4):
            model(x).square().sum().backward()
            seen.append(masks(model)["0"])
            optimizer.step()
    assert step_of(model) == 4
    drawn = not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    final = all(torch.equal(mask, final_masks(model)["0"]) for mask in seen)
    assert drawn or final or said


def test_freezing_a_layer_midway_splits_no_time_loop() -> None:
    """Steps are exact and a time loop sees one sample when a layer is frozen on the way."""
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with heard():
        for number, x in enumerate(batches(6)):
            if number == 3:
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            loss, used = torch.zeros(()), []
            for _ in range(3):
                loss = loss + model(x).square().sum()
                used.append(masks(model))
            assert same(used[0], used[2])
            loss.backward()
            optimizer.step()
    assert step_of(model) == 6


@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_masks_stay_frozen(set_to_none: bool) -> None:
    """In the frozen part of the schedule momentum moves no mask, whatever zero_grad does."""
    model = sparse(total_steps=14)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    frozen, final = [], []
    for step, x in enumerate(batches(14)):
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x).square().sum().backward()
        if step >= 12:  # 0.85 of 14
            frozen.append(masks(model))
            final.append(final_masks(model))
        optimizer.step()
    assert all(same(frozen[0], other) for other in (*frozen, *final))
    assert same(frozen[0], masks(model))
    assert same(frozen[0], final_masks(model))


@pytest.mark.parametrize("how", ["copy", "replace", "module"])
def test_frozen_logits_can_be_written_by_hand(how: str) -> None:
    """Averaged or restored weights and logits are taken as they are, in the frozen part too."""
    model, other = sparse(total_steps=10), sparse(seed=5, total_steps=10)
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
                new = nn.Parameter(wanted[name], requires_grad=parameter.requires_grad)
                setattr(model.get_submodule(owner), key, new)
            else:
                parameter.data = wanted[name].clone()
    for training in (False, True):
        model.train(training)
        model(batches(1)[0])
        state = model.state_dict()
        logits = {name: v for name, v in wanted.items() if name.endswith("_logits")}
        assert all(torch.equal(state[n].reshape(v.shape), v) for n, v in logits.items())
    restored = sparse(seed=5, total_steps=10)
    restored.load_state_dict(model.state_dict())
    assert same(final_masks(model), final_masks(restored))
    assert not same(final_masks(model), final_masks(other))


def test_writing_between_forward_and_backward() -> None:
    """Gradients are those of the forward pass that was made, or torch refuses."""
    model, plain = sparse(), sparse()
    x = batches(1)[0]
    plain(x).square().sum().backward()
    loss = model(x).square().sum()
    with torch.no_grad():
        model[2].weight_dense.mul_(2)
    try:
        loss.backward()
    except RuntimeError:
        return
    for name, layer in (("0", model[0]), ("2", model[2]), ("4", model[4])):
        expected = plain.get_submodule(name).weight_dense.grad
        torch.testing.assert_close(layer.weight_dense.grad, expected)


def test_folded_in_the_middle_of_a_step() -> None:
    """Between forward and backward: whatever is folded is N:M, and the plain layers train on."""
    model = sparse()
    loss = model(batches(1)[0]).square().sum()
    spikenm_fx.fold(model)
    spikenm_fx.verify(model, dict.fromkeys("024", "2:4")).raise_if_invalid()
    try:
        loss.backward()
    except RuntimeError:
        model.zero_grad()
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), batches(2))
