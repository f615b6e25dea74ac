# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: tensors only, complete or not at all, and errors that say what does not fit."""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from torch import nn

import spikenm_fx
from spikenm_fx.checkpoint import load_into, load_state, save_state, write_atomically
from spikenm_fx.errors import CheckpointError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_state_survives_the_file(tmp_path: Path, suffix: str) -> None:
    """What is written is read back bit by bit."""
    path, model = tmp_path / f"w{suffix}", net()
    save_state(path, model.state_dict())
    again = load_state(path)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net"])
def test_training_scripts_wrappings_are_taken_off(tmp_path: Path, wrapper: str) -> None:
    """A state dict under a usual key, with DataParallel's prefix, loads into the plain model."""
    model = net()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "w.pth")
    other = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    load_into(other, load_state(tmp_path / "w.pth"))
    assert torch.equal(other[0].weight, model[0].weight)


@tries(60)
@given(st.binary(max_size=80), st.sampled_from([".pt", ".safetensors"]))
def test_any_bytes_give_a_checkpoint_error(content: bytes, suffix: str) -> None:
    """No file content makes the reader raise anything but CheckpointError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_state(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    """A pickle that would create a folder is refused, and creates none."""
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "w.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("w.pt", "raw.pt"):
        with pytest.raises(CheckpointError):
            load_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_file_is_an_error(tmp_path: Path, suffix: str, keep: int) -> None:
    """A file cut short is named as such."""
    path = tmp_path / f"w{suffix}"
    save_state(path, net().state_dict())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=path.name):
        load_state(path)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"a": {"b": 1}}])
def test_file_without_tensors_is_an_error(tmp_path: Path, content: Any) -> None:
    """A file that holds no tensors by name says what is required."""
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_state(tmp_path / "w.pt")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    """A path that is no file is named."""
    with pytest.raises(CheckpointError, match="no such file"):
        load_state(tmp_path / "none.pt")


def test_all_that_does_not_fit_is_listed_and_nothing_is_copied() -> None:
    """Missing, foreign (with the near key) and misshapen keys come in one error."""
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    state["2.wieght"] = state.pop("2.weight")
    state["0.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state, source="w.pt")
    message = str(caught.value)
    for part in ("w.pt does not fit", "1 missing", "2.wieght (near: 2.weight)", "file (7,)"):
        assert part in message
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    """A write that fails half-way leaves no part behind, and the older file as it was."""
    path = tmp_path / "w.bin"
    path.write_bytes(b"older")

    def write(part: Path) -> None:
        part.write_bytes(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_atomically(path, write)
    assert path.read_bytes() == b"older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.bin"]


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    """A folder that does not exist is named, and not created."""
    with pytest.raises(CheckpointError, match="could not be written"):
        save_state(tmp_path / "none" / "w.pt", net().state_dict())


def test_shared_and_strided_tensors_can_be_saved(tmp_path: Path) -> None:
    """Tied and transposed tensors are written, which safetensors alone refuses."""
    tied = torch.rand(4, 6)
    save_state(tmp_path / "w.safetensors", {"a": tied, "b": tied, "c": tied.t()})
    assert torch.equal(load_state(tmp_path / "w.safetensors")["c"], tied.t())


def test_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    """The file is readable as any new file is, not private like a temporary one."""
    (tmp_path / "usual").write_text("")
    save_state(tmp_path / "w.pt", net().state_dict())
    assert (tmp_path / "w.pt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_training_scripts_save_beside_the_weights(tmp_path: Path) -> None:
    """The state dict is found whatever it is called; where several might be meant, that is said."""
    model, path = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "file.pt"
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    state, states = model.state_dict(), optimizer.state_dict()
    for saved in (
        {"net": state, "opt": states},
        {"student": state, "opt": states, "epoch": torch.tensor(3)},
        {"net": state, "epoch": torch.tensor(3)},
        {f"_orig_mod.module.{key}": value for key, value in state.items()},
        {f"module._orig_mod.{key}": value for key, value in state.items()},
        {f"model.{key}": value for key, value in state.items()},
        {"state_dict": {f"net.body.{key}": value for key, value in state.items()}},
    ):
        torch.save(saved, path)
        other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        load_into(other, load_state(path))
        pairs = zip(other.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    torch.save({"ema": state, "student": state}, path)
    with pytest.raises(CheckpointError, match="'ema', 'student'"):
        load_state(path)


def test_sparse_and_dense_checkpoints_load_into_either() -> None:
    """Masks are no keys that miss: a dense model gets masked weights, a sparse one dense ones."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    sparse, dense = spikenm_fx.sparsify(network(), "2:4"), network()
    state = sparse.state_dict()
    load_into(dense, state)
    assert torch.equal(dense[1].weight, state["1.weight"])
    assert spikenm_fx.verify(dense, {"1": "2:4"})
    plain = network().state_dict()
    load_into(sparse, plain)
    sparse.eval()
    kept = sparse[1].weight != 0
    assert torch.equal(sparse[1].weight[kept], sparse[1].weight_dense[kept])
    with pytest.raises(CheckpointError, match="1 missing in the file"):
        load_into(dense, {key: value for key, value in state.items() if key != "2.bias"})
