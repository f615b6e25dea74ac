# SPDX-License-Identifier: Apache-2.0
"""What a user must be told, once, with what to do; and what ``progress`` tells all the time."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from loops import (
    heard,
    logits,
    masks,
    same,
    sparse,
    sparse_spiking,
    step_of,
    train,
    train_step,
)
from strategies import batches, network
from torch import nn

import spikenm_fx
from spikenm_fx.errors import CheckpointError, SpikeNMError, SpikeNMWarning
from spikenm_fx.masks.methods.spikenm import SpikeNM


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


# -- progress -------------------------------------------------------------------------------------


def test_progress_tells_step_phase_and_changes() -> None:
    """Fading, annealing, frozen, in this order; masks change until the freeze and not after it."""
    model = sparse("1:8", total_steps=40)
    optimizer, phases, shares = sgd(model, 0.1), [], []
    spikenm_fx.progress(model)
    for step, x in enumerate(batches(40)):
        now = spikenm_fx.progress(model)
        assert now.step == step
        phases.append(now.phase)
        shares.append(now.changed)
        train_step(model, optimizer, x)
    order = list(dict.fromkeys(phases))
    assert order == ["fading", "annealing", "frozen"]
    assert phases.index("frozen") == 34  # 0.85 of 40
    assert all(0 <= share <= 1 for share in shares)
    assert max(shares[1:30]) > 0
    assert all(share == 0 for share in shares[35:])


@pytest.mark.parametrize(("nm", "total"), [("2:4", None), ("1:8", None), ("2:4", 20)])
def test_nothing_fades_at_half_or_without_a_length(nm: str, total: int | None) -> None:
    """There the first phase is annealing, and without total_steps the only one."""
    model = sparse(nm, total_steps=total)
    phases = []
    for x in batches(20):
        phases.append(spikenm_fx.progress(model).phase)
        train_step(model, sgd(model), x)
    assert list(dict.fromkeys(phases)) == (["annealing", "frozen"] if total else ["annealing"])


def test_changes_are_since_last_asked() -> None:
    """The share is that of the positions of training masks that differ from those last asked."""
    model = sparse()
    spikenm_fx.progress(model)
    before = masks(model)
    train(model, sgd(model, 0.1), batches(3))
    after = masks(model)
    differ = sum(int((before[k] != after[k]).sum()) for k in before)
    total = sum(mask.numel() for mask in before.values())
    assert spikenm_fx.progress(model).changed == pytest.approx(differ / total)
    assert spikenm_fx.progress(model).changed == 0


def test_asking_for_progress_prints_and_changes_nothing(capsys: pytest.CaptureFixture) -> None:
    """A read, however often: no output, the state is what it was."""
    model = sparse()
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        spikenm_fx.progress(model)
    assert same(before, model.state_dict())
    assert capsys.readouterr().out == ""


# -- before a fade has ended ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["fold", "eval"])
@pytest.mark.parametrize("at", [0, 1, 9])
def test_leaving_in_the_middle_of_a_fade_is_told(what: str, at: int) -> None:
    """Undrawn weights still take part in training: evaluation and fold are of another network."""
    model = sparse("1:8", total_steps=100)
    train(model, sgd(model), batches(at))
    with heard() as said:
        if what == "eval":
            for _ in range(3):
                model.eval()(batches(1)[0])
                train(model.train(), sgd(model), batches(1))
        else:
            spikenm_fx.fold(model)
    (text,) = said
    assert "fad" in text
    assert "51" in text or "step" in text, "until when"
    assert "SpikeNM(fade=0" in text or "total_steps" in text, "what to do"


@pytest.mark.parametrize("case", ["2:4", "1:8 without length", "faded", "fade=0", "state dicts"])
def test_where_nothing_fades_nothing_is_said(case: str) -> None:
    """Half kept, no known length, a fade that ended, none asked for; and looking at states."""
    total = None if "without" in case else 20
    method = SpikeNM(fade=0.0) if case == "fade=0" else "spikenm"
    model = sparse("2:4" if case == "2:4" else "1:8", total_steps=total, method=method)
    train(model, sgd(model), batches(12 if case == "faded" else 3))
    if case == "state dicts":
        model.state_dict(), spikenm_fx.dense_state_dict(model), copy.deepcopy(model)
        return
    model.eval()(batches(1)[0])
    spikenm_fx.fold(model)


# -- the length of the run ------------------------------------------------------------------------


@pytest.mark.parametrize("nm", ["2:4", "1:8"])
def test_training_past_the_end_is_told_once(nm: str) -> None:
    """More steps than total_steps: one warning that names both."""
    model = sparse(nm, total_steps=10)
    train(model, sgd(model), batches(10))
    with pytest.warns(SpikeNMWarning, match="total_steps=10") as caught:
        train(model, sgd(model), batches(30))
    assert len(caught) == 1
    assert step_of(model) == 40


def test_epochs_for_steps_are_told() -> None:
    """A total_steps over before an epoch is: the warning guesses that epochs were meant."""
    model = sparse(total_steps=12)
    with pytest.warns(SpikeNMWarning, match="epochs"):
        train(model, sgd(model), batches(60))


def test_the_very_last_step_is_no_step_too_many() -> None:
    """Exactly total_steps steps, validation and fold after them: not a word."""
    model = sparse("1:8", total_steps=10)
    train(model, sgd(model), batches(10))
    model.eval()(batches(1)[0])
    spikenm_fx.fold(model)


@pytest.mark.parametrize("total", [None, 200, 50])
def test_a_resume_with_another_length_is_told(total: int | None) -> None:
    """The checkpoint stores total_steps: another one is refused or warned of, with both numbers."""
    source = sparse(total_steps=100)
    train(source, sgd(source), batches(4))
    target = sparse(total_steps=total)
    before = copy.deepcopy(target.state_dict())
    with heard() as said:
        try:
            target.load_state_dict(source.state_dict())
        except CheckpointError as error:
            said.append(str(error))
            assert same(before, target.state_dict())
    assert len(said) == 1
    assert "100" in said[0]
    assert str(total) in said[0]
    assert "total_steps" in said[0]


@pytest.mark.parametrize("total", [None, 100])
def test_a_resume_with_the_same_length_is_silent(total: int | None) -> None:
    """The same settings on both sides load without a word and go on at the same step."""
    source, target = sparse(total_steps=total), sparse(total_steps=total)
    train(source, sgd(source), batches(4))
    target.load_state_dict(source.state_dict())
    assert step_of(target) == 4
    assert same(source.state_dict(), target.state_dict())


def test_dense_checkpoints_have_no_length_to_compare() -> None:
    """Loading dense weights into a sparse model says nothing of lengths."""
    sparse(total_steps=30).load_state_dict(network(seed=2).state_dict())


# -- foreign tensors ------------------------------------------------------------------------------


def test_checkpoints_of_another_pattern_change_nothing() -> None:
    """Refused before a tensor is copied, and the run goes on."""
    model = sparse()
    optimizer = sgd(model)
    train(model, optimizer, batches(2))
    before = copy.deepcopy(model.state_dict()), masks(model)
    with pytest.raises(CheckpointError, match="1:4"):
        model.load_state_dict(sparse("1:4").state_dict())
    assert same(before[0], model.state_dict())
    assert same(before[1], masks(model))
    train(model, optimizer, batches(2))
    assert step_of(model) == 4


def test_parameters_of_another_pattern_cannot_be_averaged_in() -> None:
    """An average over models of two patterns meets logits of another shape: loud, not silent."""
    model, other = sparse("2:4"), sparse("1:8")
    ours, theirs = list(model.parameters()), list(other.parameters())
    assert any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad(), pytest.raises(RuntimeError):
        torch._foreach_lerp_(ours, theirs, 0.5)


def _averaged_into(average: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.5)


def test_an_average_of_another_pattern_of_the_same_blocks_is_told() -> None:
    """2:4 averaged into 1:4 has fitting shapes: evaluation names both patterns, once."""
    gc.collect()  # a model of an earlier test might be its like
    model, average = sparse("2:4"), sparse("1:4")
    train(model, sgd(model), batches(2))
    _averaged_into(average, model)
    with pytest.warns(SpikeNMWarning, match=r"masked 1:4.* masks 2:4") as told:
        average.eval()(batches(1)[0])
    assert len(told) == 1
    average.eval()(batches(1)[0])
    model.eval()(batches(1)[0])


def test_a_copy_of_logits_of_another_pattern_is_refused() -> None:
    """Where the numbers are the other model's own there is no doubt, and it is an error."""
    gc.collect()
    model, other = sparse("2:4"), sparse("1:4", seed=5)
    train(model, sgd(model), batches(2))
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    for _ in range(2):
        with pytest.raises(SpikeNMError, match=r"masked 1:4.* copied .* masks 2:4"):
            other.eval()(batches(1)[0])
    model.eval()(batches(1)[0])


def test_models_of_two_patterns_live_side_by_side() -> None:
    """Trained, loaded, reported, averaged with their like: none is taken for another's average."""
    model, other, like = sparse("2:4"), sparse("1:4"), sparse("1:4", seed=3)
    train(model, sgd(model), batches(2))
    spikenm_fx.report(other, batches(1)[0])
    other.eval()(batches(1)[0])
    train(other.train(), sgd(other), batches(2))
    _averaged_into(like, other)
    like.eval()(batches(1)[0])
    other.load_state_dict(like.state_dict())
    other.eval()(batches(1)[0])


# -- EID ------------------------------------------------------------------------------------------


class OnlyInner(nn.Module):
    """A training module of which only ``self.net(x)`` is called, as Lightning's is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).square().mean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("never called in training")


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "without"])
def test_eid_is_on_where_only_a_part_of_the_model_is_called(examples: bool) -> None:
    """Logits move as with the inner model sparsified by itself, or a warning says EID is off."""
    from loops import sequences, spiking_net
    from strategies import ALL_LAYERS

    from spikenm_fx.masks import EID

    runs = []
    for wrapped in (True, False):
        net = spiking_net()
        model = OnlyInner(net) if wrapped else net
        method = SpikeNM(eid=EID(every=2, weight=(1.0, 1.0)))
        example = sequences(1)[0] if examples and not wrapped else None
        spikenm_fx.sparsify(
            model, "2:4", rules=ALL_LAYERS, method=method, example_inputs=example
        ).train()
        first = logits(model)
        with heard() as said:
            for x in sequences(4):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                optimizer.zero_grad()
                loss = model.training_step(x) if wrapped else model(x).square().mean()
                loss.backward()
                optimizer.step()
        averages = [v for k, v in model.state_dict().items() if k.endswith("_eid")]
        assert said or sum(bool(v.any()) for v in averages) == 2
        assert not same(first, logits(model))
        runs.append((said, [bool(v.any()) for v in averages]))
    if not runs[0][0]:
        assert runs[0][1] == runs[1][1]


def test_logits_are_not_lost_in_transit() -> None:
    """Moving a model in precision and back leaves progress, masks and learning in place."""
    model = sparse_spiking()
    from loops import sequences

    train(model, sgd(model), sequences(3))
    model.to(torch.float64).to(torch.float32)
    assert step_of(model) == 3
    first = logits(model)
    train(model, sgd(model, 0.05), sequences(3))
    assert step_of(model) == 6
    assert not same(first, logits(model))


def test_errors_are_ours() -> None:
    """A plain model has no progress: the error says which call is missing."""
    with pytest.raises(SpikeNMError, match="sparsify"):
        spikenm_fx.progress(network())
