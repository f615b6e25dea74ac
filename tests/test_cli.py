# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, JSON, files, and errors without a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy
import pytest
import torch
import yaml
from few_rounds import few_rounds

import spikenm_fx
from spikenm_fx.bench.__main__ import main as bench_main
from spikenm_fx.checkpoint import load_metadata, load_state, save_state
from spikenm_fx.cli import main
from spikenm_fx.errors import SpikeNMError
from spikenm_fx.recipe import checking, loaded, trial
from spikenm_fx.recipe.results import BEGIN, END
from spikenm_fx.recipe.schema import load_recipe

pytestmark = pytest.mark.usefixtures("few_rounds")
__all__ = ["few_rounds"]

NET = """
import torch
from torch import nn


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class LIF(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = 0.0

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        self.v = self.v * 0.5 + x
        spike = Fire.apply(self.v - 0.1)
        self.v = self.v * (1 - spike)
        return spike


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem, self.lif1 = nn.Conv2d(3, width, 3, padding=1), LIF()
        self.body, self.lif2 = nn.Conv2d(width, width, 3, padding=1), LIF()
        self.head = nn.Linear(width, 5)

    def reset(self):
        self.lif1.reset()
        self.lif2.reset()

    def forward(self, x):
        self.reset()
        out = 0
        for _ in range(3):
            out = out + self.head(self.lif2(self.body(self.lif1(self.stem(x)))).mean((2, 3)))
        return out
"""


SCRIPTED = """

class Mix(torch.jit.ScriptModule):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(16, 16)

    @torch.jit.script_method
    def forward(self, x):
        return self.key(x)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mix, self.b, self.head = (
            nn.Linear(16, 16), Mix(), nn.Linear(16, 16), nn.Linear(16, 2)
        )

    def forward(self, x):
        return self.head(self.b(self.mix(self.a(x))))
"""

TIMED = """
import torch
from torch import nn
from spikenm_fx.demo.networks import LIF, OverTime


class Leading(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.lif = OverTime(nn.Conv2d(3, 8, 3)), LIF()
        self.b, self.head = OverTime(nn.Conv2d(8, 8, 3)), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lif(self.b(self.lif(self.a(x)))).mean((0, 3, 4)))


class StepByStep(Leading):
    def forward(self, x):
        first = torch.stack([self.a.module(step) for step in x])
        return self.head(self.lif(self.b(self.lif(first))).mean((0, 3, 4)))


class Second(StepByStep):
    def forward(self, x):
        return super().forward(x.transpose(0, 1))


class Inside(Leading):
    def forward(self, x):
        return super().forward(x.expand(4, *x.shape))
"""


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, object]:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Run the command line in this process."""

    def call(*words: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Ran(int(left.value.code or 0), out, err)

    return call


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A user's own repository with one network."""
    (tmp_path / "toy_net_for_cli.py").write_text(NET)
    yield tmp_path
    sys.modules.pop("toy_net_for_cli", None)


TARGET = "toy_net_for_cli:Net"


@pytest.fixture
def weights(project: Path) -> Path:
    sys.path.insert(0, str(project))
    try:
        module = __import__("toy_net_for_cli")
    finally:
        sys.path.remove(str(project))
    torch.manual_seed(0)
    path = project / "dense.safetensors"
    save_state(path, module.Net().state_dict())
    return path


def test_help_documents_the_exit_codes(run) -> None:
    """The codes are in the help of the program and of each command."""
    assert "Exit codes" in run("--help").out
    assert "Exit codes" in run("verify", "--help").out
    assert run("--help").code == 0


@pytest.mark.parametrize("words", [["nonsense"], ["plan"], ["plan", "--nonsense"], ["verify"]])
def test_wrong_usage_is_code_2(run, words: list[str]) -> None:
    """An unknown command or option, or a missing argument, is wrong usage."""
    ran = run(*words)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_plan_lists_every_layer(run, project: Path) -> None:
    """Text and JSON name each weight layer with its decision."""
    ran = run("plan", TARGET, "--root", project, "--json")
    assert ran.code == 0
    names = [layer["name"] for layer in ran.data["layers"]]
    assert names == ["stem", "body", "head"]
    text = run("plan", TARGET, "--root", project, "--nm", "1:4").out
    assert "1 of 3 weight layers" in text
    assert "1:4" in text


def test_what_a_model_prints_stays_out_of_the_json(run, project: Path) -> None:
    """Research code prints while it is imported and built; standard output stays one document."""
    file = project / "toy_net_for_cli.py"
    file.write_text(file.read_text() + "\nprint('loading...')\n")
    for words in (["plan"], ["doctor", "-i", "2,3,8,8"], ["report", "-i", "2,3,8,8"]):
        ran = run(words[0], TARGET, "--root", project, *words[1:], "--json")
        assert ran.code == 0
        assert ran.data["layers"]
        sys.modules.pop("toy_net_for_cli")


def test_plan_and_sparsify_see_the_same_trace(run, project: Path, weights: Path) -> None:
    """With an input shape, every command decides by the traced signals."""
    out = project / "sparse.safetensors"
    words = ("--root", project, "-i", "2,3,8,8", "--json")
    planned = run("plan", TARGET, *words).data["layers"]
    assert planned[0]["reason"] == "input is analog image"
    made = run("sparsify", TARGET, "-c", weights, "-o", out, *words).data["plan"]["layers"]
    assert made == planned
    assert run("plan", TARGET, "--root", project, "-i", "2,4,8,8").code == 3


def test_packages_beside_the_checkouts_serve_every_command(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROOT/_site/NAME-VERSION provides what a recipe requires; else how to install it is told."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "old_net_for_cli.py").write_text("import older_package_for_cli.part\n" + NET)
    file = tmp_path / "old.yaml"
    file.write_text(
        "version: 1\ntarget: {repo: o/n, commit: abcdef1, build: 'old_net_for_cli:Net', "
        "requires: ['older_package_for_cli==1.2']}\n"
        "inputs: {shape: [2, 3, 8, 8], time: inside}\n"
    )
    ran = run("plan", file, "--root", tmp_path)
    assert ran.code == 3
    assert "--target ROOT/_site/older_package_for_cli-1.2 older_package_for_cli==1.2" in ran.err
    package = tmp_path / "_site" / "older_package_for_cli-1.2" / "older_package_for_cli"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("")
    for command in ("plan", "doctor", "report"):
        assert run(command, file, "--root", tmp_path).code == 0
    for name in [name for name in sys.modules if "_for_cli" in name]:
        del sys.modules[name]


def test_code_outside_the_root_is_code_3(run, project: Path) -> None:
    """A target outside the root is refused with a message instead of a traceback."""
    ran = run("plan", "os:getcwd", "--root", project)
    assert ran.code == 3
    assert "outside the allowed root" in ran.err
    assert "Traceback" not in ran.err


def test_errors_are_json_where_json_is_asked(run, project: Path) -> None:
    """With --json an error is one JSON document with its type, message and code."""
    ran = run("plan", "toy_net_for_cli:Nett", "--root", project, "--json")
    assert ran.code == 3
    assert ran.data["error"]["type"] == "RecipeError"
    assert "near: Net" in ran.data["error"]["message"]


def test_debug_shows_the_traceback(project: Path) -> None:
    """--debug lets the error through, wherever it stands."""
    with pytest.raises(SpikeNMError):
        main(["plan", "toy_net_for_cli:Nett", "--root", str(project), "--debug"])


def test_bug_is_code_4(run, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw has a code of its own and a hint at --debug."""
    monkeypatch.setattr(loaded, "plan", lambda *_, **__: 1 / 0)
    ran = run("plan", TARGET, "--root", project)
    assert ran.code == 4
    assert "--debug" in ran.err
    assert "Traceback" not in ran.err


def test_interrupting_is_code_130(run, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends quietly, with the code that shells expect."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loaded, "plan", interrupted)
    ran = run("plan", TARGET, "--root", project)
    assert ran.code == 130
    assert "Traceback" not in ran.err


def test_sparsify_writes_a_valid_dense_keyed_checkpoint(run, project: Path, weights: Path) -> None:
    """The written file has the dense keys, is N:M where planned, keeps the largest weights."""
    out = project / "sparse.safetensors"
    before = weights.read_bytes()
    ran = run("sparsify", TARGET, "-c", weights, "-o", out, "--root", project, "--json")
    assert ran.code == 0
    assert weights.read_bytes() == before
    dense, sparse = load_state(weights), load_state(out)
    assert sparse.keys() == dense.keys()
    assert spikenm_fx.verify(sparse, {"body": "2:4"}).valid
    blocks = dense["body.weight"].unflatten(1, (4, 4)).abs()
    kept = sparse["body.weight"].unflatten(1, (4, 4)) != 0
    assert bool((kept == (blocks.argsort(2).argsort(2) >= 2)).all())
    assert torch.equal(sparse["stem.weight"], dense["stem.weight"])


@pytest.mark.parametrize("method", ["cyclical", "regrow", "uticket"])
def test_sparsify_takes_every_method(run, method: str, project: Path, weights: Path) -> None:
    """By its name; what it writes is N:M."""
    out = project / "sparse.safetensors"
    words = ("-c", weights, "-o", out, "--root", project, "--method", method)
    assert run("sparsify", TARGET, *words).code == 0
    assert spikenm_fx.verify(load_state(out), {"body": "2:4"}).valid


def test_sparsify_by_activity_needs_to_know(run, project: Path, weights: Path) -> None:
    """The input, and the rule of the neurons; nothing is written without."""
    out = project / "sparse.safetensors"
    words = ("-c", weights, "-o", out, "--root", project, "--method", "activity")
    for more, says in (((), "--input"), (("-i", "2,3,8,8"), "register_neuron")):
        ran = run("sparsify", TARGET, *words, *more)
        assert ran.code == 3
        assert says in ran.err
    assert not out.exists()


def test_verify_tells_valid_from_invalid(run, project: Path, weights: Path) -> None:
    """Code 0 for N:M weights, 1 for others, without any model; both as JSON too."""
    out = project / "sparse.pt"
    assert run("sparsify", TARGET, "-c", weights, "-o", out, "--root", project).code == 0
    assert run("verify", out).code == 0
    assert run("verify", weights).code == 1
    ran = run("verify", weights, "--nm", "2:4", "--json")
    assert ran.code == 1
    assert ran.data["valid"] is False
    assert run("verify", out, "--nm", "4:2").code == 3


def test_verify_reads_packed_files(run, project: Path, weights: Path) -> None:
    """A packed file is unpacked and counted, without a model; a damaged one is code 3."""
    sparse, packed = project / "sparse.safetensors", project / "packed.safetensors"
    run("sparsify", TARGET, "-c", weights, "-o", sparse, "--root", project)
    assert run("pack", TARGET, "-c", sparse, "-o", packed, "--root", project).code == 0
    ran = run("verify", packed, "--json")
    assert ran.code == 0
    required = {layer["name"]: layer["required"] for layer in ran.data["layers"]}
    assert required["body"] == "2:4"
    assert run("verify", packed, "--nm", "1:4", "--except", "head").code == 1
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert "checksum" in run("verify", packed).err


def test_a_dense_file_is_told_why_it_is_not_valid(run, weights: Path) -> None:
    """Without a pattern the verdict says that no weight is N:M, with one how many break it."""
    assert "none of them is N:M" in run("verify", weights).out
    text = run("verify", weights, "--nm", "2:4").out
    assert "2 of them violate" in text
    assert "--except body --except head" in text


def test_verify_holds_every_weight_to_the_pattern(run, project: Path, weights: Path) -> None:
    """The order of keys (by name, in safetensors) decides nothing; exceptions are named."""
    out = project / "sparse.safetensors"
    run("sparsify", TARGET, "-c", weights, "-o", out, "--root", project)
    promised = {
        layer["name"]: layer["required"] for layer in run("verify", out, "--json").data["layers"]
    }
    assert promised == {"body": "2:4", "head": None, "stem": None}
    assert run("verify", out, "--nm", "2:4").code == 1
    assert run("verify", out, "--nm", "2:4", "--except", "head").code == 0
    assert "did you mean 'head'" in run("verify", out, "--nm", "2:4", "--except", "heda").err
    assert run("verify", out, "--nm", "2:512").code == 3
    state = load_state(out)
    state["body.weight"][3, :4, 0, 0] = 1.0
    save_state(out, state, metadata=load_metadata(out))
    assert run("verify", out).code == 1
    save_state(out, state, metadata={"spikenm_fx.layers": "[1"})
    assert "damaged" in run("verify", out).err


@contextlib.contextmanager
def quiet(null: IO[str]) -> Iterator[None]:
    """Nothing reaches the capture's files, which the limit would hit too."""
    with contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
        yield


WRITES = {
    "sparsify": ("sparsify", TARGET, "-c", "dense.safetensors", "-o", "{out}.safetensors"),
    "sparsify as .pt": ("sparsify", TARGET, "-c", "dense.safetensors", "-o", "{out}.pt"),
    "permute": ("permute", TARGET, "-c", "dense.safetensors", "-i", "2,3,8,8", "-o", "{out}.pt"),
    "remove": (
        *("remove-channels", TARGET, "-c", "dense.safetensors", "-i", "2,3,8,8"),
        *("-o", "{out}.safetensors"),
    ),
    "pack": ("pack", TARGET, "-c", "sparse.safetensors", "-o", "{out}.safetensors"),
    "report": ("report", TARGET, "-i", "2,3,8,8", "--html", "{out}.html"),
    "init": ("recipe", "init", TARGET, "-i", "2,3,8,8", "-o", "{out}.yaml"),
    "table": ("recipe", "check", "net.yaml", "--root", ".", "--in-process", "--table", "{out}.md"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_full_disk_leaves_nothing_behind(
    run, project: Path, weights: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command that writes, on a disk that takes 100 bytes: code 3, no file, no part of one."""
    monkeypatch.chdir(project)
    run("sparsify", TARGET, "-c", weights, "-o", "sparse.safetensors")
    run("recipe", "init", TARGET, "-i", "2,3,8,8", "-o", "net.yaml")
    before = sorted(project.iterdir())
    words = [word.format(out="out") for word in WRITES[name]]
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep half of a module
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with open(os.devnull, "w") as null, pytest.raises(SystemExit) as left, quiet(null):
            main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert left.value.code == 3
    assert sorted(project.iterdir()) == before
    assert run(*words).code == 0


@pytest.mark.parametrize("content", ["sparse", "truncated", "empty", "folder", "missing"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_unreadable_checkpoints_are_code_3(
    run, project: Path, weights: Path, content: str, suffix: str
) -> None:
    """Every command that reads weights names the file that it cannot read, and writes nothing."""
    file, out = project / f"bad{suffix}", project / "out.safetensors"
    save_state(file, load_state(weights))
    whole = file.read_bytes()
    if content == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif content == "empty":
        file.write_bytes(b"")
    elif content in ("folder", "missing"):
        file.unlink()
        if content == "folder":
            file.mkdir()
    for words in (
        ("verify", file),
        ("sparsify", TARGET, "-c", file, "-o", out, "--root", project),
        ("pack", TARGET, "-c", file, "-o", out, "--root", project),
        ("report", TARGET, "-c", file, "-i", "2,3,8,8", "--root", project),
    ):
        if content == "sparse":  # the file is sound: the test can fail
            assert words[0] == "pack" or run(*words).code in (0, 1)
            continue
        ran = run(*words)
        assert ran.code == 3
        assert file.name in ran.err
        assert "Traceback" not in ran.err
        assert not out.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\n", "larger than"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias"),
        ("version: 1\n\ttarget: x\n", "tab"),
        ("version: 1\nversion: 1\n", "given twice"),
        (
            "version: 1\ntarget: {package: torch, build: 'os:getcwd'}\n"
            "inputs: {shape: [1], time: none}\n",
            "outside the allowed root",
        ),
        (
            "version: 1\ntarget: {package: bindsnet, build: 'bindsnet.network:Network'}\n"
            "inputs: {shape: [1], time: none}\n",
            "no module 'bindsnet'",
        ),
    ],
    ids=["10 MB", "anchors", "tabs", "duplicate", "outside", "missing framework"],
)
def test_bad_recipes_are_code_3_in_every_command(
    run, project: Path, weights: Path, text: str, says: str
) -> None:
    """Whatever a recipe is given to, its mistake is told at once, without a traceback."""
    file, out = project / "bad.yaml", project / "out.safetensors"
    file.write_text(text * 2_000_000 if says == "larger than" else text)
    for words in (
        ("plan", file),
        ("doctor", file),
        ("report", file),
        ("sparsify", file, "-c", weights, "-o", out),
    ):
        ran = run(*words, "--root", project)
        assert ran.code == 3
        assert says in ran.err
        assert "Traceback" not in ran.err
    assert not out.exists()


def test_permute_writes_weights_of_which_n_m_keeps_more(run, project: Path, weights: Path) -> None:
    """Dense keys and shapes, channels moved, the same outputs; sparsify --permute does both."""
    out, words = project / "permuted.pt", ("--root", project, "-i", "2,3,8,8")
    ran = run("permute", TARGET, "-c", weights, "-o", out, *words, "--seconds", 1, "--json")
    assert ran.code == 0
    (moved,) = [group for group in ran.data["groups"] if group["order"]]
    assert moved["layers"] == ["body"]
    assert moved["kept_after"] > moved["kept_before"]
    before, after = load_state(weights), load_state(out)
    assert torch.equal(after["body.weight"], before["body.weight"][:, moved["order"]])
    assert torch.equal(after["stem.weight"], before["stem.weight"][moved["order"]])
    assert torch.equal(after["head.weight"], before["head.weight"])
    kept = []
    for name, more in (("plain", ()), ("both", ("--permute",))):
        sparse = project / f"{name}.safetensors"
        assert run("sparsify", TARGET, "-c", weights, "-o", sparse, *words, *more).code == 0
        assert run("verify", sparse).code == 0
        kept.append(float(load_state(sparse)["body.weight"].abs().sum()))
    assert kept[1] > kept[0]
    assert run("permute", TARGET, "-c", weights, "-o", project / "x.pt", *words[:2]).code == 3
    wrong = run("permute", TARGET, "-c", weights, "-o", project / "x.pt", *words, "--score", "no")
    assert wrong.code == 3
    assert "'magnitude', 'rate'" in wrong.err
    assert not (project / "x.pt").exists()


def test_recipes_say_what_is_done_with_channels(run, project: Path, weights: Path) -> None:
    """Permuted before the masks; dead ones removed after folding when the recipe is checked."""
    file, out = project / "net.yaml", project / "sparse.safetensors"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", file)
    run("sparsify", file, "-c", weights, "-o", out, "--root", project)
    plain = float(load_state(out)["body.weight"].abs().sum())
    file.write_text(file.read_text() + "\nchannels: {permute: true, remove_dead: true}\n")
    run("sparsify", file, "-c", weights, "-o", out, "--root", project, "--force")
    assert float(load_state(out)["body.weight"].abs().sum()) > plain
    assert "channels permute, remove dead" in run("recipe", "show", file).out
    assert run("recipe", "check", file, "--root", project, "--in-process").code == 0


def test_recipes_say_which_share_of_channels_stays(run, project: Path, weights: Path) -> None:
    """Whole blocks of the most active ones; what is written is smaller, and read by its recipe."""
    file, out = project / "net.yaml", project / "sparse.safetensors"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", file)
    file.write_text(file.read_text() + "\nchannels: {keep: 0.3}\n")
    before = load_state(weights)["body.weight"].shape
    assert run("sparsify", file, "-c", weights, "-o", out, "--root", project).code == 0
    after = load_state(out)["body.weight"].shape
    assert after[1] < before[1]
    assert after[1] % 4 == 0
    assert run("verify", out, "--recipe", file, "--root", project).code == 0
    assert "channels keep 0.3" in run("recipe", "show", file).out
    assert run("recipe", "check", file, "--root", project, "--in-process").code == 0
    refused = run("sparsify", file, "-c", weights, "-o", project / "x.pt", "--root", project)
    assert refused.code == 3
    assert not (project / "x.pt").exists()
    file.write_text(file.read_text().replace("keep: 0.3", "keep: 1.5"))
    assert "keep" in run("recipe", "show", file).err


@pytest.mark.slow
def test_dead_channels_are_removed_from_a_file(run, project: Path, weights: Path) -> None:
    """Parameters, bytes, SynOps and times before and after; every command reads what is left."""
    state = load_state(weights)
    state["body.weight"][:, 4:8] = 0
    state["body.weight"][0, 8:12] = 0
    save_state(weights, state)
    sparse, out = project / "sparse.safetensors", project / "smaller.safetensors"
    words = ("--root", project, "-i", "2,3,8,8")
    run("sparsify", TARGET, "-c", weights, "-o", sparse, *words)
    command = ("remove-dead-channels", TARGET, "-c", sparse, "-o", out, *words)
    ran = run(*command, "--latency", "--json")
    assert ran.code == 0
    assert ran.data["removal"]["removed"] == 4
    before, after = ran.data["removal"]["parameters"]
    left = load_state(out)
    assert after == sum(tensor.numel() for tensor in left.values()) < before
    compared = ran.data["comparison"]
    assert compared["after"]["dense_bytes"] < compared["before"]["dense_bytes"]
    assert compared["after"]["synops_per_sample"] == compared["before"]["synops_per_sample"]
    names = [f"{when}, {how}" for when in ("before", "after") for how in ("folded", "packed")]
    assert list(compared["latency"]) == names
    assert "4 channels removed" in run(*command, "--force").out
    assert run("verify", out, "--json").data["valid"]
    assert run("verify", out, "--recipe", TARGET, "--root", project).code == 0
    assert run("report", TARGET, "-c", out, *words).code == 0
    packed = project / "packed.safetensors"
    assert run("pack", TARGET, "-c", out, "-o", packed, *words).code == 0
    assert run("verify", packed).code == 0
    assert run("verify", packed, "--recipe", TARGET, "--root", project).code == 0


def test_channels_that_are_silent_on_data_are_removed(run, project: Path, weights: Path) -> None:
    """A batch of nothing makes no neuron spike; without it they might."""
    state = load_state(weights)
    state["stem.bias"].fill_(-0.1)
    save_state(weights, state)
    data, out = project / "dark.npy", project / "smaller.safetensors"
    numpy.save(data, numpy.zeros((2, 3, 8, 8), dtype=numpy.float32))
    command = ("remove-dead-channels", TARGET, "-c", weights, "-o", out, "--root", project)
    assert run(*command, "-i", "2,3,8,8", "--json").data["removal"]["removed"] == 0
    ran = run(*command, "--silent-on", data, "--force", "--json")
    assert ran.data["removal"]["removed"] > 0


@pytest.mark.slow
def test_a_share_of_the_channels_is_kept(run, project: Path, weights: Path) -> None:
    """As many as asked for, in multiples; wrong words and files are refused, nothing is written."""
    out, words = project / "smaller.safetensors", ("--root", project, "-i", "2,3,8,8")
    command = ("remove-channels", TARGET, "-c", weights, *words)
    ran = run(*command, "-o", out, "--keep", 0.3, "--multiple-of", 4, "--json")
    assert ran.code == 0
    assert load_state(out)["stem.weight"].shape == (8, 3, 3, 3)
    assert run("plan", TARGET, "--root", project, "-i", "2,3,8,8").code == 0
    text = run(*command, "-o", out, "--multiple-of", 8, "--force").out
    assert "channels removed" in text
    assert "SynOps" in text
    sparse = project / "sparse.safetensors"
    assert run("sparsify", TARGET, "-c", out, "-o", sparse, *words, "--permute").code == 0
    again = project / "again.safetensors"
    following = ("remove-dead-channels", TARGET, "-c", sparse, *words)
    assert run(*following, "-o", again).code == 0
    assert run("plan", TARGET, *words).code == 0
    assert run("verify", again).code == 0
    as_torch = run("sparsify", TARGET, "-c", out, "-o", project / "x.pt", *words)
    assert as_torch.code == 3
    assert ".safetensors" in as_torch.err
    for more, says in (
        (("-o", project / "x.pt"), ".safetensors"),
        (("-o", project / "x.safetensors", "--keep", 2), "keep=2.0"),
        (("-o", project / "x.safetensors", "--score", "size"), "'membrane' or 'magnitude'"),
        (("-o", out), "--force"),
    ):
        ran = run(*command, *more)
        assert ran.code == 3
        assert says in ran.err
    assert not list(project.glob("x.*"))


def test_init_finds_out_where_time_is(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[T, B, ...] whole or step by step, [B, T, ...], and images: the draft says which it is."""
    (tmp_path / "timed_nets_for_cli.py").write_text(TIMED)
    monkeypatch.chdir(tmp_path)
    for name, shape, wanted in (
        ("Leading", "4,2,3,8,8", "leading"),
        ("StepByStep", "4,2,3,8,8", "leading"),
        ("Second", "2,4,3,8,8", "second"),
        ("Inside", "2,3,8,8", "inside"),
    ):
        ran = run("recipe", "init", f"timed_nets_for_cli:{name}", "-i", shape, "--json")
        assert ran.code == 0
        assert yaml.safe_load(ran.data["recipe"])["inputs"]["time"] == wanted
    ran = run("report", "timed_nets_for_cli:Leading", "-i", "4,2,3,8,8", "--json")
    assert ran.data["samples"] == 2 * 2
    sys.modules.pop("timed_nets_for_cli")


def test_data_tells_where_time_is(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are counted along the data's own batch axis; --input may differ in that alone."""
    (tmp_path / "timed_nets_for_cli.py").write_text(TIMED)
    monkeypatch.chdir(tmp_path)
    leading = numpy.ones((4, 2, 3, 8, 8), dtype=numpy.float32)
    second = leading.swapaxes(0, 1)
    for name, batch in (("Leading", leading), ("StepByStep", leading), ("Second", second)):
        numpy.save("x.npy", batch)
        ran = run("report", f"timed_nets_for_cli:{name}", "--data", "x.npy", "--json")
        assert ran.data["samples"] == 2
    words = ("report", "timed_nets_for_cli:Second", "--data", "x.npy", "--json")
    assert run(*words, "-i", "2,4,3,8,8").data["samples"] == 2
    ran = run(*words, "-i", "2,8,3,8,8")
    assert ran.code == 3
    assert "2,8,3,8,8" in ran.out
    assert "2,4,3,8,8" in ran.out
    sys.modules.pop("timed_nets_for_cli")


@pytest.mark.parametrize(
    "recipe", ["spikingjelly-cifar10net", "snntorch-tutorial6-cnn", "norse-convnet"]
)
def test_the_pattern_asked_for_is_the_pattern(run, recipe: str) -> None:
    """--nm holds for every layer that a shipped recipe makes sparse, rules that name 2:4 too."""
    file = Path(__file__).parent.parent / "recipes" / f"{recipe}.yaml"
    package = load_recipe(file).target.package or ""
    pytest.importorskip(package)
    layers = run("plan", file, "--nm", "1:4", "--json").data["layers"]
    before = run("plan", file, "--json").data["layers"]
    for one, two in zip(layers, before, strict=True):
        assert one["nm"] == (None if two["nm"] is None else "1:4")
    assert {layer["nm"] for layer in before} == {None, "2:4"}


def test_rules_with_a_pattern_of_their_own_keep_it(run, project: Path) -> None:
    """Only rules that repeat the recipe's pattern follow --nm."""
    out = project / "net.yaml"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    recipe = yaml.safe_load(out.read_text())
    recipe["rules"] = [{"match": "head", "nm": "1:8"}]
    out.write_text(yaml.safe_dump(recipe))
    ran = run("plan", out, "--root", project, "--nm", "1:4", "--json")
    found = {layer["name"]: layer["nm"] for layer in ran.data["layers"]}
    assert found == {"stem": None, "body": "1:4", "head": "1:8"}


@pytest.mark.parametrize("command", ["plan", "doctor", "report"])
def test_an_input_that_no_memory_holds_is_code_3(run, project: Path, command: str) -> None:
    """A typing error in a shape is no internal error."""
    ran = run(command, TARGET, "--root", project, "-i", "2000000000,3,100000,100000")
    assert ran.code == 3
    assert "(2000000000, 3, 100000, 100000)" in ran.err


def test_data_that_is_no_batch_is_code_3(run, project: Path) -> None:
    """Missing, cut short, not numbers, code, NaN: told apart, before anything is measured."""
    file = project / "x.npy"
    words = ("report", TARGET, "--root", project, "-i", "2,3,8,8", "--data", file)
    assert "no such file" in run(*words).err
    good = numpy.random.default_rng(0).random((2, 3, 8, 8), dtype=numpy.float32)
    numpy.save(file, good)
    assert run(*words).code == 0
    whole = file.read_bytes()
    for content in (whole[:-5], whole[:50], b""):
        file.write_bytes(content)
        ran = run(*words)
        assert ran.code == 3
        assert "not an array of numbers" in ran.err
    for bad in (numpy.array(["a"]), numpy.array([{}], dtype=object)):
        numpy.save(file, bad)
        assert run(*words).code == 3
    good[1, 2, 3, 4] = numpy.nan
    numpy.save(file, good)
    ran = run(*words)
    assert ran.code == 3
    assert "NaN or infinity" in ran.err


def test_existing_file_is_not_replaced(run, project: Path, weights: Path) -> None:
    """--out never replaces a file unless --force says so."""
    out = project / "sparse.pt"
    out.write_bytes(b"precious")
    words = ("sparsify", TARGET, "-c", weights, "-o", out, "--root", project)
    assert run(*words).code == 3
    assert out.read_bytes() == b"precious"
    assert run(*words, "--force").code == 0
    assert run("sparsify", TARGET, "-c", weights, "-o", project / "no" / "x.pt").code == 3
    os.mkfifo(project / "pipe.pt")
    words = ("sparsify", TARGET, "-c", weights, "-o", project / "pipe.pt", "--root", project)
    assert run(*words, "--force").code == 3
    assert (project / "pipe.pt").is_fifo()
    (project / "link.pt").symlink_to(out)
    out.write_bytes(b"older")
    words = ("sparsify", TARGET, "-c", weights, "-o", project / "link.pt", "--root", project)
    assert run(*words, "--force").code == 0
    assert (project / "link.pt").is_symlink()
    assert out.read_bytes() != b"older"


def test_foreign_checkpoint_is_listed(run, project: Path, weights: Path) -> None:
    """A checkpoint of another model lists its keys, and nothing is written."""
    save_state(project / "other.pt", {"stem.weight": torch.zeros(1), "x.weight": torch.zeros(2, 2)})
    out = project / "sparse.pt"
    ran = run("sparsify", TARGET, "-c", project / "other.pt", "-o", out, "--root", project)
    assert ran.code == 3
    assert "does not fit Net" in ran.err
    assert not out.exists()


def test_report_writes_one_page(run, project: Path, weights: Path) -> None:
    """Table, JSON and HTML of the same model; data may come from a file."""
    page, data = project / "report.html", project / "batch.safetensors"
    save_state(data, {"images": torch.randn(4, 3, 8, 8)})
    words = ["report", TARGET, "--root", project, "-i", "2,3,8,8", "-c", weights, "--sparsify"]
    ran = run(*words, "--html", page)
    assert ran.code == 0
    assert "body" in ran.out
    assert page.read_text().startswith("<!doctype html>")
    again = run(*words, "--data", data, "--json")
    assert again.data["samples"] == 4
    assert again.data["total"]["synops_per_sample"] > 0
    assert [layer["pattern"] for layer in again.data["layers"]] == [None, "2:4", None]


def test_report_times_what_there_is_and_takes_other_energies(
    run, project: Path, weights: Path
) -> None:
    """Dense, folded and packed take turns where the model is sparse; constants are the user's."""
    words = ["report", TARGET, "--root", project, "-i", "2,3,8,8", "-c", weights, "--json"]
    dense = run(*words, "--latency").data
    assert set(dense["latency"]["total"]) == {"dense"}
    sparse = run(*words, "--latency", "--sparsify").data
    assert list(sparse["latency"]["total"]) == ["dense", "folded", "packed"]
    assert sparse["layers"][1]["kept_magnitude"] > 0.5
    free = run(*words, "--pj-per-ac", "0", "--pj-per-mac", "10").data
    assert free["energy"] == {"pj_per_ac": 0.0, "pj_per_mac": 10.0}
    total = free["total"]
    assert total["picojoule_per_sample"] == 10 * total["macs_per_sample"]
    assert run(*words, "--pj-per-ac", "-1").code == 2


def test_wrong_input_shape_is_code_3(run, project: Path) -> None:
    """An input the model cannot run names its shape; a malformed one its form."""
    ran = run("report", TARGET, "--root", project, "-i", "2,4,8,8")
    assert ran.code == 3
    assert "(2, 4, 8, 8)" in ran.err
    assert run("report", TARGET, "--root", project, "-i", "2,x,8").code == 3
    assert run("report", TARGET, "--root", project).code == 3


def test_doctor_tells_signals_and_neurons(run, project: Path) -> None:
    """Each layer has its signal and the neuron it drives; the trace names its route."""
    ran = run("doctor", TARGET, "--root", project, "-i", "2,3,8,8", "--json")
    assert ran.code == 0
    layers = {layer["name"]: layer for layer in ran.data["layers"]}
    assert layers["stem"]["signal"] == "analog"
    assert layers["body"]["signal"] == "spike"
    assert layers["body"]["feeds"] == ["lif2"]
    assert 0 < layers["body"]["rate"] < 1  # gains of a silent network would flatter
    text = run("doctor", TARGET, "--root", project).out
    assert "--input" in text
    assert run("recipe", "schema", "--json").code == 0


def test_doctor_says_how_layers_run_and_what_to_do(run, project: Path) -> None:
    """Kernels with measured gains are summed up; dense-by-default and hidden layers have advice."""
    file = project / "toy_net_for_cli.py"
    file.write_text(file.read_text() + SCRIPTED)
    text = run("doctor", TARGET, "--root", project, "-i", "2,3,8,8").out
    assert "kernels  " in text
    assert "N:M layers over dense: median" in text
    assert "{match: NAME, nm: '2:4'} [head]" in text
    ran = run("doctor", "toy_net_for_cli:Scripted", "--root", project, "-i", "2,16", "--json")
    assert ran.code == 1  # its kernels cannot be tried
    hidden = [layer for layer in ran.data["layers"] if layer["name"] == "mix.key"]
    assert hidden[0]["pattern"] is None
    assert "PYTORCH_JIT=0" in hidden[0]["advice"]


def test_pack_writes_what_unpacks_to_the_same(run, project: Path, weights: Path) -> None:
    """Packing a sparse checkpoint stores it smaller, and a dense one is refused."""
    from spikenm_fx.pack import load_packed, unpack_weight

    sparse, out = project / "sparse.safetensors", project / "packed.safetensors"
    assert run("sparsify", TARGET, "-c", weights, "-o", sparse, "--root", project).code == 0
    ran = run("pack", TARGET, "-c", sparse, "-o", out, "--root", project, "--json")
    assert ran.code == 0
    packed, rest = load_packed(out)
    state = load_state(sparse)
    assert torch.equal(unpack_weight(packed["body"]), state["body.weight"])
    assert rest.keys() | {"body.weight"} == state.keys()
    refused = run("pack", TARGET, "-c", weights, "-o", project / "x", "--root", project)
    assert refused.code == 1
    assert not (project / "x").exists()


def test_init_writes_a_recipe_that_checks(run, project: Path) -> None:
    """The drafted recipe is valid, commented, and passes its own check."""
    out = project / "net.yaml"
    words = ("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    assert run(*words).code == 0
    assert run(*words).code == 3
    text = out.read_text()
    assert "action: keep_dense" in text
    assert yaml.safe_load(text)["expected"] == {"layers": 3, "sparse": 1}
    ran = run("recipe", "check", out, "--root", project, "--in-process", "--json")
    stages = json.loads(ran.out)[0]["stages"]
    assert ran.code == 0, stages
    assert stages["fold"] == stages["verify"] == stages["train"] == "ok"
    assert "TARGET" not in run("recipe", "show", out).out


@pytest.mark.slow
def test_check_fails_for_a_recipe_of_another_version(run, project: Path) -> None:
    """A plan that differs from what the recipe expects fails the check with both counts."""
    out, table = project / "net.yaml", project / "table.md"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    out.write_text(out.read_text().replace("sparse: 1", "sparse: 2"))
    ran = run("recipe", "check", out, "--root", project, "--table", table)
    assert ran.code == 1
    assert "1 of 3 layers become sparse" in ran.out
    assert "plan failed" in table.read_text()


@pytest.mark.parametrize("broken", ["", "body", "head"])
def test_check_sees_one_wrong_packed_weight(
    run, project: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """An engine one of whose packed weights is another fails the check, which says where."""
    from spikenm_fx.pack import pack

    def spoiled(model: torch.nn.Module, *args: object, **options: object) -> torch.nn.Module:
        engine = pack(model, *args, **options)
        if broken:
            layer = engine.get_submodule(broken)
            layer.values.view(-1)[layer.values.abs().argmax()] += 1.0
            layer.choose(layer.choice)
        return engine

    out = project / "net.yaml"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    monkeypatch.setattr(trial, "pack", spoiled)
    ran = run("recipe", "check", out, "--root", project, "--in-process", "--json")
    (result,) = json.loads(ran.out)
    if not broken:
        assert ran.code == 0
        assert result["packed"]["neurons"] == 2
        assert result["packed"]["difference"] < 1e-5
        return
    assert ran.code == 1
    seen = {"body": "lif2 receives something else", "head": "the output differs"}
    assert seen[broken] in result["stages"]["pack"]


def test_check_of_nothing_that_is_here_is_code_3(run, project: Path) -> None:
    """A recipe without its checkout is skipped; where all are, nothing was tried: code 3."""
    out, here = project / "net.yaml", project / "here.yaml"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    ran = run("recipe", "check", out, "--in-process")
    assert ran.code == 3
    assert "0 ok, 0 failed, 1 skipped" in ran.out
    assert "--root" in ran.err
    ran = run("recipe", "check", out, "--in-process", "--json")
    assert ran.code == 3
    assert json.loads(ran.out)[0]["skipped"]
    here.write_text(
        "version: 1\ntarget: {package: torch, build: 'torch.nn:Sequential', args: "
        "[{call: 'torch.nn:Linear', args: [8, 8]}, {call: 'torch.nn:Linear', args: [8, 8]}, "
        "{call: 'torch.nn:Linear', args: [8, 8]}]}\ninputs: {shape: [2, 8], time: none}\n"
    )
    ran = run("recipe", "check", out, here, "--in-process")
    assert ran.code == 0
    assert "1 ok, 0 failed, 1 skipped" in ran.out


def test_doctor_on_an_input_that_does_not_run_is_code_3(
    run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The diagnosis is printed all the same; kernels that cannot be tried are code 1."""
    words = ("doctor", TARGET, "--root", project, "--json")
    ran = run(*words, "-i", "2,4,8,8")
    assert ran.code == 3
    assert ran.data["runs"] is False
    assert [layer["name"] for layer in ran.data["layers"]] == ["stem", "body", "head"]
    assert any("(2, 4, 8, 8)" in text for text in ran.data["blocked"])
    unknown = run(*words)
    assert unknown.code == 0
    assert unknown.data["runs"] is None

    def fails(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(sys.modules["spikenm_fx.doctor"], "pack", fails)
    ran = run(*words, "-i", "2,3,8,8")
    assert ran.code == 1
    assert any("no kernel" in text for text in ran.data["blocked"])


def test_exit_codes_are_in_every_help_text(run) -> None:
    """What a code means is told where users look for it."""
    for words in ([], ["doctor"], ["recipe", "check"]):
        assert "Exit codes: 0 done" in " ".join(run(*words, "--help").out.split())


@pytest.mark.parametrize("table", ["nomarks.md", "swapped.md", "gone/table.md", "folder", "x.bin"])
def test_check_looks_at_the_table_first(
    run, project: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """A table that cannot be renewed is told before an hour of checks, not behind it."""
    out = project / "net.yaml"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    (project / "folder").mkdir()
    (project / "nomarks.md").write_text("text")
    (project / "swapped.md").write_text(f"{END}\n{BEGIN}\n")
    (project / "x.bin").write_bytes(b"\xff\xfe")
    before = {path: path.read_bytes() for path in project.iterdir() if path.is_file()}
    monkeypatch.setattr(checking, "check_recipe", lambda *_: pytest.fail("too late"))
    words = ("recipe", "check", out, "--in-process", "--root", project)
    assert run(*words, "--table", project / table).code == 3
    assert {path: path.read_bytes() for path in project.iterdir() if path.is_file()} == before


def test_check_refuses_a_root_that_is_not_there(run, project: Path) -> None:
    """A typing error in --root would else skip every recipe of a repository without a word."""
    out = project / "net.yaml"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    ran = run("recipe", "check", out, "--root", project / "gone")
    assert ran.code == 3
    assert "is not a folder" in ran.err


def test_check_lists_the_mistakes_of_all_files(run, project: Path) -> None:
    """All invalid files are reported before anything is built."""
    (project / "r").mkdir()
    (project / "r" / "a.yaml").write_text("version: 2\n")
    (project / "r" / "b.yaml").write_text("nm: 2:4\n")
    ran = run("recipe", "check", project / "r")
    assert ran.code == 3
    assert "a.yaml" in ran.err
    assert "quote it" in ran.err


def test_schema_is_printed(run) -> None:
    """The JSON Schema comes out as JSON."""
    assert run("recipe", "schema").data["title"] == "spikenm_fx recipe"


@pytest.mark.slow
def test_bench_lists_runs_and_hands_back_its_figures(run, project: Path) -> None:
    """Without a name all are listed; with --json what a benchmark printed and saved comes back."""
    assert set(run("bench", "--json").data["benches"]) >= {"sampler", "layers", "tutorials"}
    assert run("bench").out.startswith("accuracy")
    (project / "01_fine.py").write_text("print('hello')")
    ran = run("bench", "tutorials", "--json", "--", "--folder", project)
    assert ran.code == 0
    assert ran.data["output"][0].split()[:2] == ["ok", "01_fine.py"]
    (project / "02_broken.py").write_text("1 / 0")
    assert run("bench", "tutorials", "--", "--folder", project).code == 1
    wrong = run("bench", "samplr", "--json")
    assert wrong.code == 2
    assert "did you mean 'sampler'" in wrong.data["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("accuracy", "--data", "nope"), 3, "nope"),
        (("layers", "--patterns", "3:2"), 3, "3:2"),
        (("step", "--threads", "0"), 2, "at least 1"),
        (("planning", "--width", "0"), 2, "at least 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_benchmarks_refuse_bad_input(
    capfd: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, says: str
) -> None:
    """One line and a code of its own: 1 would mean that the answer is no."""
    try:
        status = bench_main(list(words))
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == code
    said = capfd.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_benchmarks_write_where_they_are_told(tmp_path: Path) -> None:
    """A small run of one's own does not replace the figures that came with the package."""
    shipped = Path(spikenm_fx.__file__).parent / "bench" / "results" / "planning.json"
    before = shipped.read_bytes()
    options = ["--width", "64", "--depth", "1", "--repeats", "1", "--out", str(tmp_path)]
    assert bench_main(["planning", *options]) == 0
    assert (tmp_path / "planning.json").is_file()
    assert shipped.read_bytes() == before


def test_demo_looks_at_its_folder_first(run, tmp_path: Path) -> None:
    """Before it trains for a minute."""
    (tmp_path / "file").write_text("")
    ran = run("demo", "--out", tmp_path / "file")
    assert ran.code == 3
    assert "no folder" in ran.err


@pytest.mark.slow
def test_init_without_a_shape_finds_one_that_runs(run, project: Path) -> None:
    """The draft is accepted as it stands, by the command that init prints, from its own folder."""
    out = project / "net.yaml"
    ran = run("recipe", "init", TARGET, "--root", project, "-o", out, "--json")
    assert ran.code == 0
    assert yaml.safe_load(out.read_text())["inputs"]["shape"] == [2, 3, 32, 32]
    program, *words = shlex.split(ran.data["next"])
    assert program == "spikenm-fx"
    ran = run(*words, "--in-process")
    assert ran.code == 0, ran.out
    assert "1 ok, 0 failed, 0 skipped" in ran.out


def test_own_code_is_found_in_the_current_folder(
    run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe of one's own code needs neither a commit nor --root where the code is."""
    monkeypatch.chdir(project)
    assert run("recipe", "init", TARGET, "-i", "2,3,8,8", "-o", "net.yaml").code == 0
    target = yaml.safe_load(Path("net.yaml").read_text())["target"]
    assert target["repo"].startswith("local/")
    assert "commit" not in target
    assert run("plan", "net.yaml").code == 0


@pytest.mark.slow
def test_init_repeats_the_plan_of_its_trace(run, tmp_path: Path) -> None:
    """Where the code alone cannot be read and the order misleads, rules say what the trace saw."""
    (tmp_path / "odd_order_for_cli.py").write_text(
        NET.replace("class Net", "class Old").replace(
            "out = 0", "out = 0 if float(x.sum()) < 1e9 else x"
        )
        + "\n\nclass Net(Old):\n    def __init__(self):\n        super().__init__()\n"
        "        self.stem, body = self.stem, self.body\n        del self.body\n"
        "        self.body = body\n"
    )
    out = tmp_path / "net.yaml"
    words = ("recipe", "init", "odd_order_for_cli:Net", "--root", tmp_path, "-i", "2,3,8,8")
    assert run(*words, "-o", out).code == 0
    assert yaml.safe_load(out.read_text())["expected"]["sparse"] == 1
    assert 'match: "body", nm: "2:4"' in out.read_text()
    ran = run("recipe", "check", out, "--root", tmp_path, "--in-process")
    sys.modules.pop("odd_order_for_cli")
    assert ran.code == 0, ran.out


def test_pack_takes_the_tightest_pattern(run, project: Path, weights: Path) -> None:
    """A 1:4 checkpoint is stored as 1:4 unless another pattern is asked for."""
    sparse = project / "sparse.safetensors"
    run("sparsify", TARGET, "-c", weights, "-o", sparse, "--nm", "1:4", "--root", project)
    words = ("pack", TARGET, "-c", sparse, "--root", project, "--json")
    tight = run(*words, "-o", project / "a.safetensors").data["layers"]["body"]
    loose = run(*words, "-o", project / "b.safetensors", "--nm", "2:4").data["layers"]["body"]
    assert (tight["pattern"], loose["pattern"]) == ("1:4", "2:4")
    assert tight["packed_bytes"] < 0.6 * loose["packed_bytes"]


@pytest.mark.slow
def test_verify_by_a_recipe(run, project: Path, weights: Path) -> None:
    """The recipe's plan is what is required, of checkpoints and of packed files."""
    out, sparse, packed = (
        project / name for name in ("net.yaml", "s.safetensors", "p.safetensors")
    )
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    run("sparsify", TARGET, "-c", weights, "-o", sparse, "--root", project)
    run("pack", TARGET, "-c", sparse, "-o", packed, "--root", project)
    words = ("--recipe", out, "--root", project)
    for file in (sparse, packed):
        ran = run("verify", file, *words, "--json")
        assert ran.code == 0
        required = {layer["name"]: layer["required"] for layer in ran.data["layers"]}
        assert required == {"stem": None, "body": "2:4", "head": None}
    assert run("verify", sparse, *words, "--nm", "1:4").code == 1
    assert run("verify", weights, *words).code == 1
    assert run("verify", weights, *words, "--except", "bodi").code == 3


@pytest.mark.slow
def test_checkpoints_of_other_kinds_are_told_apart(run, project: Path, weights: Path) -> None:
    """Packed, wrapped and unfolded files: what was found, and what to do."""
    sparse, packed = project / "s.safetensors", project / "p.safetensors"
    run("sparsify", TARGET, "-c", weights, "-o", sparse, "--root", project)
    run("pack", TARGET, "-c", sparse, "-o", packed, "--root", project)
    words = ("report", TARGET, "--root", project, "-i", "2,3,8,8", "-c")
    ran = run(*words, packed)
    assert ran.code == 3
    assert "is packed" in ran.err
    state = load_state(weights)
    wrapped, odd, learning = project / "w.pt", project / "o.pt", project / "l.pt"
    torch.save({"net": state, "opt": {"state": {}}, "epoch": torch.tensor(3)}, wrapped)
    assert run(*words, wrapped).code == 0
    torch.save({"student": state, "teacher": state}, odd)
    ran = run(*words, odd)
    assert ran.code == 3
    assert "'student', 'teacher'" in ran.err
    sys.path.insert(0, str(project))
    try:
        net = __import__("toy_net_for_cli").Net()
    finally:
        sys.path.remove(str(project))
    torch.save(spikenm_fx.sparsify(net, "2:4").state_dict(), learning)
    ran = run(*words, learning, "--json")
    assert ran.code == 0
    assert [layer["pattern"] for layer in ran.data["layers"]] == [None, "2:4", None]


def test_report_says_what_is_made_up(run, project: Path, weights: Path) -> None:
    """Noise and untrained weights are named, in the table and on the page; real ones are not."""
    page, data = project / "r.html", project / "x.npy"
    numpy.save(data, numpy.ones((2, 3, 8, 8), dtype=numpy.float32))
    words = ("report", TARGET, "--root", project, "-i", "2,3,8,8", "--html", page)
    ran = run(*words)
    for text in (ran.out, page.read_text()):
        assert "those of noise" in text
        assert "no checkpoint was given" in text
    ran = run(*words, "-c", weights, "--data", data)
    for text in (ran.out, page.read_text()):
        assert "noise" not in text
        assert "no checkpoint was given" not in text


def test_an_empty_shape_is_wrong_usage(run, project: Path) -> None:
    """Code 2, in every command that takes one."""
    for command in (("plan",), ("doctor",), ("report",), ("recipe", "init")):
        assert run(*command, TARGET, "--root", project, "-i", "").code == 2


@pytest.mark.slow
def test_doctor_advises_only_rules_that_work(run, tmp_path: Path) -> None:
    """No rule for a layer of one input channel, depthwise or not; the two are told apart."""
    (tmp_path / "one_channel_for_cli.py").write_text(
        NET.replace("nn.Conv2d(3, width", "nn.Conv2d(1, width")
        .replace(
            "nn.Conv2d(width, width, 3, padding=1)", "nn.Conv2d(width, width, 3, groups=width)"
        )
        .replace("nn.Linear(width, 5)", "nn.Sequential(nn.Linear(width, 8), nn.Linear(8, 5))")
    )
    words = ("doctor", "one_channel_for_cli:Net", "--root", tmp_path, "-i", "2,1,8,8", "--json")
    layers = {layer["name"]: layer for layer in run(*words).data["layers"]}
    sys.modules.pop("one_channel_for_cli")
    assert "rule" not in layers["stem"]["advice"] + layers["body"]["advice"]
    assert "depthwise" in layers["body"]["reason"]
    assert "depthwise" not in layers["stem"]["reason"]
    assert "rule turns it on" in layers["head.1"]["advice"]


@pytest.mark.slow
def test_an_installed_package_is_allowed_by_its_place(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is no framework is refused with the --root that allows it."""
    place = tmp_path / "site"
    (place / "installed_for_cli").mkdir(parents=True)
    (place / "installed_for_cli" / "__init__.py").write_text(NET)
    monkeypatch.syspath_prepend(place)
    file = tmp_path / "net.yaml"
    file.write_text(
        "version: 1\ntarget: {package: installed_for_cli, build: 'installed_for_cli:Net'}\n"
        "inputs: {shape: [2, 3, 8, 8], time: inside}\nreset: .reset\n"
    )
    for words in (("plan", "installed_for_cli:Net"), ("plan", file)):
        ran = run(*words)
        assert ran.code == 3
        assert f"--root {place}" in ran.err
        assert run(*words, "--root", place).code == 0
    ran = run("recipe", "check", file, "--root", place, "--in-process")
    assert ran.code == 0, ran.out
    sys.modules.pop("installed_for_cli")


def test_help_needs_no_torch() -> None:
    """What people type first answers at once: neither torch nor pydantic is imported."""
    code = (
        "import sys, contextlib\nfrom spikenm_fx.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'networkx'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_each_verb_imports_what_it_needs() -> None:
    """Verbs at hand need no package but torch's; a trace needs no compiler, recipes pydantic."""
    code = (
        "import sys, spikenm_fx\n"
        "for name in set(spikenm_fx.__all__) - {'load_recipe'}:\n    getattr(spikenm_fx, name)\n"
        "before = {'pydantic', 'yaml', 'networkx', 'torch_pruning'} & set(sys.modules)\n"
        "import torch\n"
        "spikenm_fx.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))\n"
        "before |= {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "spikenm_fx.load_recipe\n"
        "sys.exit(str(before) if before or 'pydantic' not in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
