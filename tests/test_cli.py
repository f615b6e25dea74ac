# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, JSON, files, and errors without a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import spikenm_fx
from spikenm_fx.checkpoint import load_state, save_state
from spikenm_fx.cli import main
from spikenm_fx.errors import SpikeNMError

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
    monkeypatch.setattr(spikenm_fx, "plan", lambda *_, **__: 1 / 0)
    ran = run("plan", TARGET, "--root", project)
    assert ran.code == 4
    assert "--debug" in ran.err
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


def test_existing_file_is_not_replaced(run, project: Path, weights: Path) -> None:
    """--out never replaces a file unless --force says so."""
    out = project / "sparse.pt"
    out.write_bytes(b"precious")
    words = ("sparsify", TARGET, "-c", weights, "-o", out, "--root", project)
    assert run(*words).code == 3
    assert out.read_bytes() == b"precious"
    assert run(*words, "--force").code == 0
    assert run("sparsify", TARGET, "-c", weights, "-o", project / "no" / "x.pt").code == 3


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
    text = run("doctor", TARGET, "--root", project).out
    assert "--input" in text


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
    assert refused.code == 3
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


def test_check_fails_for_a_recipe_of_another_version(run, project: Path) -> None:
    """A plan that differs from what the recipe expects fails the check with both counts."""
    out, table = project / "net.yaml", project / "table.md"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    out.write_text(out.read_text().replace("sparse: 1", "sparse: 2"))
    ran = run("recipe", "check", out, "--root", project, "--table", table)
    assert ran.code == 1
    assert "1 of 3 layers become sparse" in ran.out
    assert "plan failed" in table.read_text()


@pytest.mark.parametrize("wrong_batches", [1, 4])
def test_packing_is_wrong_only_where_no_batch_agrees(
    run, project: Path, monkeypatch: pytest.MonkeyPatch, wrong_batches: int
) -> None:
    """A spike that flips on its threshold spoils some batches, a wrong engine all of them."""
    left = {"dense": wrong_batches, "fma": 0}

    class Engine(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, backend: str) -> None:
            super().__init__()
            self.model, self.backend = model, backend

        def reset(self) -> None:
            self.model.reset()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left[self.backend] -= 1
            return self.model(x) * (1.02 if left[self.backend] >= 0 else 1.0)

    out = project / "net.yaml"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    monkeypatch.setattr(
        sys.modules["spikenm_fx.pack"], "pack", lambda model, _, backend: Engine(model, backend)
    )
    ran = run("recipe", "check", out, "--root", project, "--in-process", "--json")
    (result,) = json.loads(ran.out)
    assert result["flipped"] == pytest.approx([0.02] * wrong_batches, rel=1e-3)
    if wrong_batches == 1:
        assert ran.code == 0
    else:
        assert ran.code == 1
        assert "each of 4 batches" in result["stages"]["pack"]


def test_check_skips_what_is_not_here(run, project: Path) -> None:
    """A recipe without its checkout is skipped, which is no failure."""
    out = project / "net.yaml"
    run("recipe", "init", TARGET, "--root", project, "-i", "2,3,8,8", "-o", out)
    ran = run("recipe", "check", out, "--in-process")
    assert ran.code == 0
    assert "skipped" in ran.out


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
