# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of many ranks: complete or not at all; damaged and foreign ones are refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forked
from loops import refused, sequences, sparse_spiking, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from spikenm_fx.bench import faults
from spikenm_fx.distributed_checkpoint import CHECKSUMS, load_distributed, save_distributed

MUTATIONS = 1000


def trained(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = sparse_spiking(total_steps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, sequences(steps, seed=seed + 1))
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("checkpoints") / "good"
    save_distributed(state_of(*trained()), saved)
    return saved


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_was_saved_comes_back(folder: Path) -> None:
    """Weights, scores, credits, steps and moments; the run goes on bit by bit."""
    model, optimizer = trained()
    other, others = trained(seed=5, steps=1)
    state = state_of(other, others)
    load_distributed(state, folder)
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(other, others, **parts)
    for each in ((model, optimizer), (other, others)):
        train(*each, sequences(3, seed=9))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_a_save_that_is_killed_leaves_what_there_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last moment: no folder of the new name, and the next save of that name succeeds."""

    class Killed(BaseException):
        pass

    rename = Path.rename

    def kill(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise Killed
        return rename(path, target)

    state = state_of(*trained())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            save_distributed(state, tmp_path / "next")
    assert not (tmp_path / "next").exists()
    save_distributed(state, tmp_path / "next")
    load_distributed(state, tmp_path / "next")
    assert [path.name for path in tmp_path.iterdir()] == ["next"]


def test_a_folder_that_is_there_is_never_written_to(folder: Path) -> None:
    """The error says what to do."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    said = refused(lambda: save_distributed(state_of(*trained(seed=2)), folder))
    assert said is not None
    assert "folder of its own" in said
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def mutated(data: bytes, chosen: random.Random) -> bytes:
    """Bits flipped, bytes lost, doubled or exchanged, the end cut off."""
    at = chosen.randrange(len(data))
    end = min(len(data), at + chosen.randrange(1, 40))
    ways = (
        lambda: data[:at] + bytes([data[at] ^ (1 << chosen.randrange(8))]) + data[at + 1 :],
        lambda: data[:at],
        lambda: data[:at] + data[end:],
        lambda: data[:end] + data[at:],
        lambda: data[:at] + chosen.randbytes(end - at) + data[end:],
        lambda: data[at:] + data[:at],
    )
    return chosen.choice(ways)()


def test_damaged_metadata_are_one_error_each(folder: Path, tmp_path: Path) -> None:
    """A thousand ways to damage what describes a checkpoint: an error of ours, nothing loaded."""
    chosen = random.Random(0)
    damaged = copied(folder, tmp_path / "damaged")
    state = state_of(*trained(seed=3))
    before = {key: value.clone() for key, value in state["model"].items()}
    good = {name: (folder / name).read_bytes() for name in (".metadata", CHECKSUMS)}
    for number in range(MUTATIONS):
        name = chosen.choice(sorted(good))
        data = mutated(good[name], chosen)
        if data == good[name]:
            continue
        (damaged / name).write_bytes(data)
        assert refused(lambda: load_distributed(state, damaged)) is not None, (number, name)
        (damaged / name).write_bytes(good[name])
    assert all(torch.equal(state["model"][key], value) for key, value in before.items())
    load_distributed(state, damaged)  # undamaged again
    assert not all(torch.equal(state["model"][key], value) for key, value in before.items())


@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
def test_damaged_tensors_are_one_error(folder: Path, tmp_path: Path, how: str) -> None:
    """Found before a single one is read."""
    damaged = copied(folder, tmp_path / "damaged")
    path = damaged / "__0_0.distcp"
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "gone":
        path.unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(flipped if how == "bit" else data[:middle])
    state = state_of(*trained(seed=3))
    before = {key: value.clone() for key, value in state["model"].items()}
    said = refused(lambda: load_distributed(state, damaged))
    assert said is not None
    assert path.name in said
    assert all(torch.equal(state["model"][key], value) for key, value in before.items())


class Foreign:
    """Unpickled it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_no_code_of_a_file_runs(folder: Path, tmp_path: Path) -> None:
    """Neither of metadata whose checksum somebody has put right, nor of an entry."""
    bad, trap = copied(folder, tmp_path / "bad"), tmp_path / "trap"
    data = pickle.dumps(Foreign(trap))
    (bad / ".metadata").write_bytes(data)
    sums = json.loads((bad / CHECKSUMS).read_text())
    sums["sha256"][".metadata"] = hashlib.sha256(data).hexdigest()
    (bad / CHECKSUMS).write_text(json.dumps(sums, separators=(",", ":")))
    said = refused(lambda: load_distributed(state_of(*trained()), bad))
    assert said is not None
    assert "foreign code" in said
    save_distributed({"entry": Foreign(trap)}, tmp_path / "entry")
    said = refused(lambda: load_distributed({"entry": 1}, tmp_path / "entry"))
    assert said is not None
    assert "Python object" in said
    assert not trap.exists()


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    """A folder of torch's own, none at all, and an entry that nobody saved."""
    for other in (tmp_path, tmp_path / "none"):
        said = refused(lambda other=other: load_distributed({"x": torch.zeros(1)}, other))
        assert said is not None
        assert CHECKSUMS in said
    said = refused(lambda: load_distributed({"x": torch.zeros(1)}, folder))
    assert said is not None
    assert "x" in said


def _faults() -> None:
    sys.exit(faults.main(["--kills", "3"]))


@pytest.mark.slow
def test_killed_ranks_go_on_bit_by_bit_and_refusing_disks_are_told() -> None:
    """Two ranks under DDP, EID on, killed at random moments; and a full and a read-only disk."""
    ran = forked(_faults)
    assert ran.status == 0, ran.err[-3000:]
    found = json.loads(ran.out.splitlines()[-1])
    assert found["kills"]["one"] + found["kills"]["all"] == 3
    assert found["kills"]["other"] == 0
    for refusal in found["refusals"].values():
        assert refusal["sound"]
        assert "older checkpoints are as they were" in refusal["said"]
