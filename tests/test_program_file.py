# SPDX-License-Identifier: Apache-2.0
"""An engine in a file: the same bits in a fresh process, and damaged files refused."""

from __future__ import annotations

import hashlib
import pickle
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program_strategies import RuleNeuron
from test_program import LIF, STEP, program
from test_program_tokens import Series, Sizes
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import PackedFileError, SpikeNMError
from spikenm_fx.pack import load_packed, native_status
from spikenm_fx.program import Engine
from spikenm_fx.program.image import DIGEST, PROGRAM, sealed

pytestmark = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")

MUTATIONS = 1000


class Weighed(nn.Module):
    """Half of the channels, each times the mean of the others."""

    def forward(self, x: Tensor) -> Tensor:
        first, last = x.chunk(2, dim=1)
        y: Tensor = first * last.mean(1, keepdim=True)
        return y


class Carried(nn.Module):
    """A loop that carries spikes and membranes, and what only later versions have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.back = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        v = spikes = torch.zeros(x.shape[1], 6, 8, 8)
        seen = []
        for frame in x:
            v = 0.9 * v + self.conv(frame) + self.back(spikes)
            spikes = (v > 0.3).float()
            v = v - spikes
            seen.append(self.head(torch.sigmoid(v).flatten(1)))
        return torch.stack(seen).softmax(-1)


@pytest.fixture(scope="module", params=["plain", "carried", "words"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Networks with every kind of operation but a reduction."""
    torch.manual_seed(0)
    if request.param == "carried":
        return program(Carried().eval(), torch.rand(3, 2, 2, 8, 8))
    if request.param == "words":
        made = Series("conv", lambda: RuleNeuron(LIF), Sizes(words=3, width=6), length=5)
        return program(made.eval(), torch.rand(2, 5, 3))
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        RuleNeuron(STEP),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, groups=2),
        RuleNeuron(STEP),
        nn.AvgPool2d(2),
        Weighed(),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.LayerNorm(5),
    )
    return program(model.eval(), torch.rand(2, 2, 8, 8))


def test_a_loaded_engine_gives_the_same_bits(engine: Engine, tmp_path: Path) -> None:
    """Saved and loaded, and saved again: the same file, the same outputs."""
    file, x = tmp_path / "net.snm", torch.rand(engine.example_shape)
    engine.save(file)
    loaded = spikenm_fx.load_engine(file)
    engine.reset()
    assert torch.equal(loaded(x), engine(x))
    loaded.save(tmp_path / "again.snm")
    assert file.read_bytes() == (tmp_path / "again.snm").read_bytes()


@pytest.mark.slow
def test_a_fresh_process_needs_neither_the_model_nor_the_packing(tmp_path: Path) -> None:
    """It loads and runs without the modules that made it, and gives the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), RuleNeuron(LIF), nn.Linear(30, 4)).eval()
    x = torch.rand(5, 2, 20)
    engine = program(model, x)
    engine.save(tmp_path / "net.snm")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, spikenm_fx\n"
        "engine = spikenm_fx.load_engine('net.snm')\n"
        "torch.save(engine(torch.load('x.pt')), 'y.pt')\n"
        "print([m for m in sys.modules if m.startswith('spikenm_fx.pack.engine')"
        " or m.startswith('spikenm_fx.trace')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert torch.equal(torch.load(tmp_path / "y.pt"), engine(x))


def test_an_engine_can_be_pickled(engine: Engine) -> None:
    """It comes back at rest."""
    x = torch.rand(engine.example_shape)
    engine.reset()
    expected = engine(x)
    assert torch.equal(pickle.loads(pickle.dumps(engine))(x), expected)


def test_its_weights_are_a_packed_file(engine: Engine, tmp_path: Path) -> None:
    """``load_packed`` reads them by the names of the layers."""
    engine.save(tmp_path / "net.snm")
    weights, tensors = load_packed(tmp_path / "net.snm")
    parts = ("embed", "q", "k", "v", "project", "up", "down")
    known = {
        "0": {"0", "4", "9"},
        "conv": {"conv", "back", "head"},
        "encode.0": {"encode.0", "body.head", *(f"body.{part}.linear" for part in parts)},
    }
    assert set(weights) == next(k for n, k in known.items() if f"layer {n}" in engine.operations)
    assert tensors[PROGRAM].dtype == torch.int64


def test_a_missing_file_is_that(tmp_path: Path) -> None:
    """Python's own error."""
    with pytest.raises(FileNotFoundError):
        spikenm_fx.load_engine(tmp_path / "none.snm")


def refused(content: bytes) -> str:
    with pytest.raises(PackedFileError) as found:
        Engine(content)
    return str(found.value)


def test_other_files_are_refused_by_what_they_are(engine: Engine, tmp_path: Path) -> None:
    """Empty, truncated, not of ours, of a newer version, of another byte order."""
    content = engine.content
    assert "too short" in refused(b"")
    assert "truncated" in refused(content[: len(content) // 8])
    assert "header is damaged" in refused(content[:-8])
    swapped = content[:8][::-1] + content[8:]
    assert "the other byte order" in refused(swapped)
    version = re.search(rb'"program_version":"[12]"', content)
    assert version is not None
    newer = unsealed(content).replace(version[0], b'"program_version":"3"')
    assert "program version 3" in refused(sealed(newer))
    spikenm_fx.save_packed(tmp_path / "w", {})
    assert "no network" in refused((tmp_path / "w").read_bytes())
    assert "does not match its digest" in refused(unsealed(content))


def unsealed(content: bytes) -> bytes:
    """The file with zeros for its digest."""
    at = content.index(b'"digest":"') + 10
    return content[:at] + DIGEST.encode() + content[at + 64 :]


def test_damaged_files_are_refused(engine: Engine) -> None:
    """Any byte changed, cut or put in anywhere: one error."""
    content, dice = engine.content, random.Random(0)
    for _ in range(MUTATIONS // 2):
        wrong = bytearray(content)
        at = dice.randrange(len(wrong))
        if dice.random() < 0.7:
            wrong[at] ^= 1 << dice.randrange(8)
        elif dice.random() < 0.5:
            del wrong[at : at + dice.randrange(1, 9)]
        else:
            wrong[at:at] = dice.randbytes(dice.randrange(1, 9))
        refused(bytes(wrong))


def test_a_wrong_program_with_a_right_digest_is_refused_or_runs(engine: Engine) -> None:
    """Every word of the program may be anything, and every byte of the header: no crash."""
    content, dice = unsealed(engine.content), random.Random(1)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    words = program_place(content)
    outcomes = {"refused": 0, "runs": 0}
    x = torch.rand(engine.example_shape)
    for _ in range(MUTATIONS):
        wrong = bytearray(content)
        for _ in range(dice.choice([1, 1, 2, 4])):
            if dice.random() < 0.8:
                at = dice.randrange(words.start, words.stop, 8)
                value = dice.choice([0, 1, 2, 3, -1, 7, 64, 1 << 20, 1 << 40, -(1 << 63)])
                wrong[at : at + 8] = struct.pack("<q", value)
            else:
                wrong[dice.randrange(8, header)] = dice.randrange(32, 127)
        digest = hashlib.sha256(bytes(wrong)).hexdigest().encode()
        if wrong.count(b'"digest":"' + DIGEST.encode()) == 1:
            wrong = bytearray(bytes(wrong).replace(DIGEST.encode(), digest))
        try:
            Engine(bytes(wrong))(x)
            outcomes["runs"] += 1
        except (SpikeNMError, UnicodeDecodeError, ValueError, KeyError):
            outcomes["refused"] += 1
    assert outcomes["refused"] > MUTATIONS // 2


def program_place(content: bytes) -> range:
    """Where the words of the program lie."""
    import json

    header = struct.unpack("<Q", content[:8])[0]
    first, last = json.loads(content[8 : 8 + header])[PROGRAM]["data_offsets"]
    return range(8 + header + first, 8 + header + last)
