# SPDX-License-Identifier: Apache-2.0
"""The library without Python: the tutorial in C, and ``spikenm-run``, on saved engines."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from program_strategies import RuleNeuron
from test_program import LIF, STEP, program, sequence
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.native.build import PROJECT, wants_sanitizers
from spikenm_fx.native.toolchain import find_compiler
from spikenm_fx.pack import native_status
from spikenm_fx.program import Engine

pytestmark = [
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(wants_sanitizers(), reason="a sanitizer's runtime must be preloaded"),
]
TUTORIAL = Path(__file__).parents[1] / "tutorials" / "07_stream_in_c.c"


def compiled(source: Path, out: Path, *options: str) -> Path:
    """A program linked against the library that Python uses."""
    compiler = find_compiler()
    assert compiler is not None
    library = native_status().path
    command = [*compiler, *options, str(source), f"-I{PROJECT / 'csrc'}", "-o", str(out)]
    link = ["-x", "none", library, f"-Wl,-rpath,{Path(library).parent}"]
    subprocess.run([*command, *link], check=True)
    return out


@functools.cache
def _runner(folder: Path) -> Path:
    """Compiled once for all files of tests that run it."""
    out = folder / "spikenm-run"
    return compiled(PROJECT / "csrc" / "spikenm_run.cpp", out, "-std=c++17")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``spikenm-run``."""
    return _runner(tmp_path_factory.getbasetemp())


def numbers(text: str) -> Tensor:
    return torch.tensor([[float(x) for x in line.split()] for line in text.splitlines()])


def test_the_tutorial_in_c_classifies_a_stream(tmp_path: Path) -> None:
    """The class with most output spikes over the stream, as in Python."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), RuleNeuron(STEP), nn.Linear(32, 7), RuleNeuron(STEP))
    with torch.no_grad():
        model.get_submodule("2").weight.mul_(3)  # type: ignore[operator]
    frames = 3 * torch.rand(25, 1, 16)
    engine = program(model.eval(), frames[0])
    engine.save(tmp_path / "net.snm")
    votes = sum(engine.step(frame) for frame in frames)
    assert isinstance(votes, Tensor)
    assert votes.max() > 0
    out = compiled(TUTORIAL, tmp_path / "stream", "-x", "c", "-std=c99", "-Wall", "-Werror")
    done = subprocess.run(
        [out, tmp_path / "net.snm"], input=frames.numpy().tobytes(), capture_output=True, check=True
    )
    assert int(done.stdout) == int(votes.argmax())


def test_the_tutorial_in_c_takes_frames_and_classes_of_any_number(tmp_path: Path) -> None:
    """More of both than any array of a fixed size would hold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), RuleNeuron(STEP)).eval()
    frames = torch.rand(3, 1, 1, 200, 400)
    engine = program(model, frames[0])
    engine.save(tmp_path / "net.snm")
    votes = sum(engine.step(frame) for frame in frames)
    assert isinstance(votes, Tensor)
    assert votes.numel() > 1 << 16
    out = compiled(TUTORIAL, tmp_path / "stream", "-x", "c", "-std=c99", "-Wall", "-Werror")
    done = subprocess.run(
        [out, tmp_path / "net.snm"], input=frames.numpy().tobytes(), capture_output=True, check=True
    )
    assert int(done.stdout) == int(votes.flatten().argmax())


def saved(tmp_path: Path) -> tuple[Engine, Tensor]:
    engine, x = program(sequence(LIF), torch.rand(5, 2, 20)), torch.rand(5, 2, 20)
    engine.save(tmp_path / "net.snm")
    np.save(tmp_path / "x.npy", x.numpy())
    return engine, x


def test_spikenm_run_gives_the_bits_of_python(runner: Path, tmp_path: Path) -> None:
    """A whole input from an .npy file."""
    engine, x = saved(tmp_path)
    command = [runner, tmp_path / "net.snm", tmp_path / "x.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert torch.equal(numbers(done.stdout), engine(x).flatten(0, 1))


def test_spikenm_run_streams_from_standard_input(runner: Path, tmp_path: Path) -> None:
    """One line per time step of one stream; a stream cut within a step is an error."""
    engine, x = saved(tmp_path)
    stream = x[:, :1].contiguous()
    command = [str(runner), str(tmp_path / "net.snm")]
    done = subprocess.run(command, input=stream.numpy().tobytes(), capture_output=True, check=True)
    expected = torch.cat([engine.step(frame) for frame in stream])
    assert torch.equal(numbers(done.stdout.decode()), expected)
    cut = subprocess.run(command, input=stream.numpy().tobytes()[:-4], capture_output=True)
    assert cut.returncode == 1
    assert b"in the middle of a time step" in cut.stderr


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((5, 2, 20)), "save numpy.float32"),
        (np.zeros((5, 2, 21), np.float32), "axis 2 of the input has size 21"),
        (None, "no .npy file"),
    ],
)
def test_spikenm_run_refuses_other_inputs(
    array: np.ndarray | None, said: str, runner: Path, tmp_path: Path
) -> None:
    """With one sentence and a code."""
    saved(tmp_path)
    file = tmp_path / "bad.npy"
    if array is None:
        file.write_bytes(b"no array")
    else:
        np.save(file, array)
    done = subprocess.run([runner, tmp_path / "net.snm", file], capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr


def test_spikenm_run_refuses_other_files(runner: Path, tmp_path: Path) -> None:
    """As Python does."""
    spikenm_fx.save_packed(tmp_path / "weights", {})
    done = subprocess.run([runner, tmp_path / "weights"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no network" in done.stderr
    gone = subprocess.run([runner, tmp_path / "gone"], capture_output=True, text=True)
    assert "cannot be read: No such file" in gone.stderr
