# SPDX-License-Identifier: Apache-2.0
"""The accuracy bench: killed runs go on, budgets are equal, networks are what they say."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

import spikenm_fx
from spikenm_fx.bench import accuracy, frontier, training
from spikenm_fx.bench.data import cifar10, shrunk
from spikenm_fx.bench.nets.cifar import NETWORKS
from spikenm_fx.bench.shapes import moving_shapes
from spikenm_fx.bench.training import Run, train
from spikenm_fx.demo.data import Split
from spikenm_fx.masks.diagnostics import diagnose, flip_rate, logit_noise
from spikenm_fx.trace import trace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny() -> Split:
    """Two easy classes."""
    torch.manual_seed(0)
    images = torch.rand(40, 1, 8, 8) * 0.2
    images[::2, :, :4] += 0.8
    labels = torch.arange(40) % 2
    return Split(images[:32], labels[:32], images[32:], labels[32:])


def run_of(method: str, **options) -> Run:
    return Run(method, "2:4", 0, epochs=4, batch=16, steps=2, **options)


class KilledError(Exception):
    pass


@pytest.fixture(scope="module", params=["spikenm", "magnitude", "srste", "uticket"])
def whole(request: pytest.FixtureRequest, tiny: Split, tmp_path_factory) -> dict[str, Any]:
    """A run that nobody kills, of each method."""
    return train(run_of(request.param), tiny, tmp_path_factory.mktemp("whole"), lambda *_: None)


@pytest.mark.parametrize("at", [1, 3])
def test_a_killed_run_goes_on(whole: dict[str, Any], at: int, tiny: Split, tmp_path) -> None:
    """A run killed after any epoch ends exactly as one that was not."""

    def kill(epoch: int, loss: float) -> None:
        if epoch == at:
            raise KilledError

    run = run_of(whole["run"]["method"])
    with pytest.raises(KilledError):
        train(run, tiny, tmp_path, kill)
    assert list(tmp_path.glob("*.pt"))
    resumed = train(run, tiny, tmp_path, lambda *_: None)
    assert not list(tmp_path.glob("*.pt"))
    for key in ("accuracy", "density", "history"):
        assert resumed[key] == whole[key], key
    assert len(whole["history"]) == 4


def test_a_finished_run_is_not_repeated(tiny: Split, tmp_path) -> None:
    """Its file is read; other settings under the same name are an error."""
    first = train(run_of("random"), tiny, tmp_path, lambda *_: None)

    def never(epoch: int, loss: float) -> None:
        raise AssertionError

    assert train(run_of("random"), tiny, tmp_path, never) == json.loads(json.dumps(first))
    with pytest.raises(ValueError, match="other settings"):
        train(run_of("random", lr=1.0), tiny, tmp_path, never)


def test_magnitude_is_dense_for_the_first_half(tiny: Split, tmp_path, monkeypatch) -> None:
    """ASP's recipe within the same budget: train dense, prune once, fine-tune."""
    calls = []
    real = spikenm_fx.sparsify

    def spy(network, *args, **options):
        calls.append(len(states[0].history))
        return real(network, *args, **options)

    states: list[training._State] = []
    real_state = training._State

    def keep(run, data):
        states.append(real_state(run, data))
        return states[-1]

    monkeypatch.setattr(training, "_State", keep)
    monkeypatch.setattr(spikenm_fx, "sparsify", spy)
    result = train(run_of("magnitude"), tiny, tmp_path, lambda *_: None)
    assert calls == [2]
    assert [bool(epoch["masks"]) for epoch in result["history"]] == [False, False, True, True]


def test_the_command(tiny: Split, tmp_path, capsys, monkeypatch) -> None:
    """A small bench prints a table and writes JSON and a plot."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(accuracy, "digits", lambda: tiny)
    small = ["--epochs", "1", "--batch", "16", "--steps", "2", "--seeds", "0", "1"]
    where = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--name", "t"]
    methods = ["--methods", "dense", "srste", "spikenm", "--patterns", "1:8", "--threads", "1"]
    accuracy.main([*small, *where, *methods])
    said = capsys.readouterr().out
    assert "1:8" in said
    assert "±" in said
    result = json.loads((tmp_path / "accuracy-t.json").read_text())
    assert {(r["method"], r["pattern"]) for r in result["rows"]} == {
        ("dense", "dense"),
        ("srste", "1:8"),
        ("spikenm", "1:8"),
    }
    assert all(len(row["accuracies"]) == 2 for row in result["rows"])
    assert result["settings"]["data"]["train"] == 32
    assert (tmp_path / "accuracy-t.png").stat().st_size > 1000


def test_cifar_from_jpeg_bytes(tmp_path) -> None:
    """JPEG bytes become normalised images; the subset is the same each time."""
    image = pytest.importorskip("PIL.Image")

    rng = np.random.default_rng(0)
    for name, count in (("train", 6), ("test", 3)):
        parts = []
        for _ in range(count):
            buffer = io.BytesIO()
            image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
            parts.append(np.frombuffer(buffer.getvalue(), np.uint8))
        offset = np.cumsum([0, *map(len, parts)])
        labels = np.arange(count, dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", jpeg=np.concatenate(parts), offset=offset, label=labels)
    data = cifar10(tmp_path, train=4)
    assert data.train_images.shape == (4, 3, 32, 32)
    assert data.test_images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(data.train_images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    again = cifar10(tmp_path, train=4)
    assert torch.equal(data.train_labels, again.train_labels)
    with pytest.raises(FileNotFoundError):
        cifar10(tmp_path / "nowhere")
    halved = shrunk(data, 16)
    torch.testing.assert_close(
        halved.test_images[..., 3, 5], data.test_images[..., 6:8, 10:12].mean((-1, -2))
    )
    assert torch.equal(halved.train_labels, data.train_labels)
    assert shrunk(data, 32) is data
    with pytest.raises(ValueError, match="20 x 20"):
        shrunk(data, 20)


SHAPES = {
    "vgg-tiny": (1, 3, 16, 16),
    "vgg-small": (1, 3, 32, 32),
    "vggsnn": (1, 2, 16, 16),
    "resnet19": (1, 3, 8, 8),
    "spikformer-4-256": (1, 3, 16, 16),
    "events-feedforward": (1, 2, 8, 8),
    "events-recurrent": (1, 2, 8, 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """Each network runs, and every layer but the readout drives a neuron."""
    torch.manual_seed(0)
    x = torch.rand(2, *SHAPES[name]) * 2
    network = NETWORKS[name](*x.shape[2:4]).eval()
    assert network(x).shape == (1, 8 if name.startswith("events") else 10)
    graph = trace(network, x)
    assert [r.name for r in graph.layers.values() if not r.post] == ["readout"]


def test_sizes_are_those_of_the_literature() -> None:
    """ResNet-19 has 12.6 million weights, VGGSNN 9.2 without readout, Spikformer-4-256 4.2."""
    counts = {}
    for name, (channels, size) in {
        "resnet19": (3, 32),
        "vggsnn": (2, 48),
        "spikformer-4-256": (3, 32),
    }.items():
        network = NETWORKS[name](channels, size)
        counts[name] = sum(p.numel() for p in network.parameters()) / 1e6
    assert counts["resnet19"] == pytest.approx(12.63, abs=0.1)
    assert counts["vggsnn"] == pytest.approx(9.27, abs=0.1)
    assert counts["spikformer-4-256"] == pytest.approx(4.15, abs=0.15)


# -- diagnostics ----------------------------------------------------------------------------------


def trained(tiny: Split, **options):
    torch.manual_seed(0)
    network = NETWORKS["vgg-small"](1, 8)
    spikenm_fx.sparsify(network, "2:4", **options)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)

    def backward() -> None:
        scores = network(tiny.train_images.expand(2, *tiny.train_images.shape))
        torch.nn.functional.cross_entropy(scores, tiny.train_labels).backward()

    backward()
    optimizer.step()
    optimizer.zero_grad()
    return network, backward


def test_diagnose(tiny: Split) -> None:
    """Flips, entropy and agreement are shares; deterministic methods do not flip."""
    network, _ = trained(tiny)
    found = diagnose(network)
    assert [d.layer for d in found] == ["features.2.module.0", "features.5.module.0", "hidden"]
    for layer in found:
        assert 0 < layer.flips < 1
        assert layer.entropy is not None
        assert 0 < layer.entropy < 1
        assert 0.5 < layer.agrees_with_magnitude <= 1
        assert layer.agrees_with_eid is not None
        assert 0 < layer.agrees_with_eid <= 1
    fixed = diagnose(trained(tiny, method="srste")[0])
    assert all(d.flips == 0 and d.agrees_with_magnitude == 1 for d in fixed)
    assert all(d.entropy is None and d.agrees_with_eid is None for d in fixed)
    mask = torch.tensor([True, True, False, False])
    assert flip_rate(mask, ~mask) == 1
    assert flip_rate(mask, mask) == 0


def test_logit_noise_changes_nothing(tiny: Split) -> None:
    """The variance of the logits' gradient is measured with and without EID, tracelessly."""
    network, backward = trained(tiny)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    noise = logit_noise(network, backward, draws=3)
    assert set(noise) == {"features.2.module.0", "features.5.module.0", "hidden"}
    for layer in noise.values():
        assert 0 < layer["with_eid"] < float("inf")
        assert 0 < layer["without_eid"] < float("inf")
    after = network.state_dict()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_moving_shapes_are_the_same_from_the_same_seed() -> None:
    """Events of zeros and ones, another world from another seed."""
    one, two, other = (moving_shapes(20, 10, steps=6, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.train_images, other.train_images)
    assert one.train_images.shape == (20, 6, 2, 12, 12)
    assert one.test_labels.shape == (10,)
    assert set(one.train_images.unique().tolist()) == {0.0, 1.0}


def test_events_show_where_a_shape_moves_to() -> None:
    """It brightens what is ahead and darkens what is behind, in each of the four directions."""
    data = moving_shapes(400, 1)
    place = torch.arange(12).float()
    up, down = data.train_images.sum(1).unbind(1)
    centres = [
        [(events * line).sum((1, 2)) / events.sum((1, 2)) for events in (up, down)]
        for line in (place.view(1, 1, -1), place.view(1, -1, 1))
    ]
    ahead = torch.stack([bright - dark for bright, dark in centres], 1)
    for direction, (axis, sign) in enumerate([(0, 1), (1, 1), (0, -1), (1, -1)]):
        mine = ahead[data.train_labels % 4 == direction]
        assert (mine[:, axis] * sign).mean() > 0.5
        assert mine[:, 1 - axis].mean().abs() < 0.5


@pytest.mark.parametrize("network", ["events-feedforward", "events-recurrent"])
def test_event_frames_go_through_time_as_they_are(network: str, tmp_path) -> None:
    """Both networks train on them, sparse and dense, and what was learnt is N:M."""
    data = moving_shapes(40, 20, steps=4)
    for method in ("dense", "spikenm"):
        run = Run(method, "dense" if method == "dense" else "1:8", 0, network=network, epochs=1)
        row = train(run, data, tmp_path, lambda *_: None)
        assert (row["density"] == 1) == (method == "dense")
        assert row["packed_bytes"] > 0
        assert row["synops"] > 0


def test_a_ticket_starts_from_the_initial_weights(tiny: Split, tmp_path, monkeypatch) -> None:
    """Half of the budget finds it, the other half trains it from the start, at its own rate."""
    seen = {}
    rewind = training._State._rewind

    def spy(state) -> None:
        rewind(state)
        seen["weight"] = state.network.hidden.weight_dense.detach().clone()
        seen["rate"] = state.optimizer.param_groups[0]["lr"]

    monkeypatch.setattr(training._State, "_rewind", spy)
    train(run_of("uticket"), tiny, tmp_path, lambda *_: None)
    first = training.build("vgg-small", tiny.train_images, 0)
    assert torch.equal(seen["weight"], first.hidden.weight)
    assert seen["rate"] == run_of("uticket").lr


def test_the_frontier_of_bytes(tiny: Split, tmp_path, capsys, monkeypatch) -> None:
    """Dense widths and sparse patterns, a budget among them, in one table and one plot."""
    monkeypatch.setattr(accuracy, "digits", lambda: tiny)
    arguments = ["--network", "vgg-tiny", "--epochs", "1", "--widths", "0.5", "1", "2", "--steps"]
    arguments += ["1", "--sparse-widths", "1", "--patterns", "2:4", "0.4 bytes", "--threads", "1"]
    frontier.main(
        [*arguments, "--batch", "32", "--out", str(tmp_path / "o"), "--results", str(tmp_path)]
    )
    table = json.loads((tmp_path / "frontier-digits.json").read_text())["rows"]
    assert [(row["width"], row["pattern"]) for row in table] == [
        *((width, "dense") for width in (0.5, 1.0, 2.0)),
        *((1.0, pattern) for pattern in ("2:4", "0.4 bytes")),
    ]
    sizes = [row["packed_bytes"] for row in table]
    assert sizes[:3] == sorted(sizes[:3])
    assert sizes[4] <= 0.4 * sizes[1]
    assert (tmp_path / "frontier-digits.png").exists()
    assert "bytes" in capsys.readouterr().out


def test_the_lead_at_a_quarter_of_the_bytes() -> None:
    """Over the line between the dense networks on either side."""

    def row(pattern: str, width: float, size: int, mean: float) -> dict:
        return {"pattern": pattern, "width": width, "packed_bytes": size, "mean": mean}

    dense = [row("dense", 0.5, 20, 0.4), row("dense", 1.0, 100, 0.6)]
    sparse = [row("1:8", 1.0, 24, 0.5), row("2:4", 1.0, 60, 0.9)]
    lead, pattern, width = frontier.gain_at_a_quarter([*dense, *sparse])
    assert (pattern, width) == ("1:8", 1.0)
    assert lead == pytest.approx(0.5 - 0.41)
    smaller = row("2:8", 1.0, 10, 0.45)  # than the smallest dense one: held against that
    assert frontier.gain_at_a_quarter([*dense, smaller])[0] == pytest.approx(0.05)
    assert frontier.gain_at_a_quarter([*dense, sparse[1]]) is None
