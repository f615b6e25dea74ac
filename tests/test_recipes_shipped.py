# SPDX-License-Identifier: Apache-2.0
"""The recipes in recipes/: all valid, with reasons; those of installed packages really applied."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from torch import nn
from zoo_cases import TRANSFORMERS, narrow_transformer, quarter_width

from spikenm_fx.cli import main
from spikenm_fx.errors import RecipeError
from spikenm_fx.native.library import native_status
from spikenm_fx.recipe import trial
from spikenm_fx.recipe.results import BEGIN, END, renew_table
from spikenm_fx.recipe.rwkv import wkv
from spikenm_fx.recipe.schema import Recipe, load_recipe
from spikenm_fx.recipe.stand_in import standing_in, switched_off
from spikenm_fx.recipe.target import build_model

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

SMALLER = {
    "shape: [4, 1, 3, 64, 64]": "shape: [2, 1, 3, 32, 32]",
    "shape: [4, 1, 3, 32": "shape: [2, 1, 3, 32",
    "shape: [4, 2, 3, 32": "shape: [2, 2, 3, 32",
    "shape: [32, 2, 1, 28": "shape: [8, 2, 1, 28",
    "shape: [4, 1, 2, 128": "shape: [2, 1, 2, 128",
}
"""What the same networks take as well: smaller images and fewer steps."""

SMALLER_TRANSFORMERS = {
    "shape: [1, 3, 64, 64]": "shape: [1, 3, 32, 32]",
    "shape: [2, 3, 32, 32], time: inside": "shape: [1, 3, 32, 32], time: inside",
    "kwargs: {T: 4}": "kwargs: {T: 2}",
}
"""The same of SpikingJelly's transformers."""

APPLIED = [file.stem for file in FILES if load_recipe(file).target.package is not None]


@each
def test_recipe_is_valid_and_gives_its_reasons(file: Path) -> None:
    """Every shipped recipe loads, expects a plan, and says why for each of its rules."""
    recipe = load_recipe(file)
    assert recipe.name
    assert recipe.expected is not None
    assert recipe.rules
    assert all(rule.reason for rule in recipe.rules)
    if recipe.target.repo is not None:
        assert len(recipe.target.commit or "") == 40
    else:
        assert any(need.startswith(f"{recipe.target.package}==") for need in recipe.target.requires)


def test_the_promised_models_have_recipes() -> None:
    """Each model family that users were promised is there, with its repository or package."""
    recipes = [load_recipe(file) for file in FILES]
    repos = {recipe.target.repo for recipe in recipes}
    assert {
        "ZK-Zhou/spikformer",
        "zhouchenlin2096/Spikingformer",
        "BICLab/Spike-Driven-Transformer",
        "BICLab/Spike-Driven-Transformer-V2",
        "zhouchenlin2096/QKFormer",
        "xyshi2000/SpikingResformer",
        "fangwei123456/Spike-Element-Wise-ResNet",
        "Gus-Lab/temporal_efficient_training",
        "ridgerchu/SpikeGPT",
    } <= repos
    packages = {recipe.target.package for recipe in recipes}
    assert {"spikingjelly", "snntorch", "norse", "braincog"} <= packages
    names = " ".join(file.stem for file in FILES)
    for family in (
        "tet-resnet19", "tet-vggsnn", "spikegpt", "sew-resnet18-imagenet", "snntorch-tutorial",
        *(f"spikingjelly-{model}" for model in (
            "spiking-resnet", "sew-resnet", "spiking-vgg", "ms-resnet", "spikformer", "sdt",
            "qkformer", "maxformer", "cifar10dvsnet", "dvsgesturenet",
        )),
    ):  # fmt: skip
        assert family in names


@pytest.mark.parametrize("name", APPLIED)
def test_recipe_of_an_installed_package_applies(
    name: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plan, sparsify, a step, fold, verify and pack succeed on the real model of the package.

    Networks are a quarter as wide, inputs smaller (see ``SMALLER``), and packed ones compared on
    one batch; the table of the recipes' README is made with all of each.
    """
    monkeypatch.setattr(trial, "_PACK_BATCHES", 1)
    file = FOLDER / f"{name}.yaml"
    package = load_recipe(file).target.package or ""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    smaller, text = tmp_path / file.name, file.read_text(encoding="utf-8")
    transformer = any(f"jelly-{known}" in name for known in TRANSFORMERS)
    for size, less in (SMALLER | (SMALLER_TRANSFORMERS if transformer else {})).items():
        text = text.replace(size, less)
    smaller.write_text(text, encoding="utf-8")
    with quarter_width(name), narrow_transformer(name), pytest.raises(SystemExit) as left:
        main(["recipe", "check", str(smaller), "--in-process", "--json"])
    (result,) = json.loads(capfd.readouterr().out)
    assert left.value.code == 0, result["stages"]
    assert list(result["stages"]) == [
        "build", "plan", "sparsify", "train", "fold", "verify", "pack",
    ]  # fmt: skip
    assert result["sparse"] > 0
    assert 2 * result["firing"][0] > result["firing"][1]
    assert result["packed"]["neurons"] > 0
    if native_status().available:
        assert result["program"] == "ok"


def row(name: str, **changes: object) -> dict[str, object]:
    return {
        "recipe": name, "title": name, "origin": "o/n@abc", "layers": 5, "sparse": 3,
        "stages": {"build": "ok", "pack": "ok"}, "firing": [2, 2], "packed": None,
        "seconds": 1.0, "environment": "torch", "ok": True, "skipped": False, **changes,
    }  # fmt: skip


def test_table_is_renewed_row_by_row(tmp_path: Path) -> None:
    """A new result replaces its row; other rows and the text around the table stay."""
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    renew_table(path, [row("b"), row("a"), row("gone", skipped=True)])
    renew_table(path, [row("a", stages={"build": "failed: no | such\nthing"})])
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in lines] == ["`a`", "`b`"]
    assert "build failed: no \\| such" in lines[0]
    assert "gone" not in text
    packed = {"neurons": 3, "difference": 3e-7, "spikes": 90_000, "ties": 0, "share": 0.0}
    tied = {**packed, "ties": 2, "share": 3e-5, "jump": 0.25}
    unseen = {**packed, "neurons": 0}
    renew_table(path, [row("a", packed=packed), row("b", packed=tied), row("c", packed=unseen)])
    a, b, c = (line.split("|") for line in path.read_text().splitlines() if line[:3] == "| `")
    assert (a[6].strip(), a[7].strip()) == ("ok (3e-07)", "none")
    assert "2 of 9.0e+04, at most 3.0e-05 at first; output then off by 0.25" in b[7]
    assert "no neurons to compare" in c[7]
    path.write_text("no marks")
    with pytest.raises(RecipeError, match="lacks the marks"):
        renew_table(path, [row("a")])


def test_stand_ins_are_inert_and_gone_afterwards() -> None:
    """A missing package imports as an inert one inside, and not at all outside; real ones stay."""
    import numpy

    with standing_in(["a_missing_logger", "numpy"], {}):
        import a_missing_logger
        from a_missing_logger.deep import Mode, register

        assert a_missing_logger.init(project="x") is not None
        assert Mode.NEAREST is not None
        assert issubclass(type("Own", (Mode,), {}), Mode)

        @register
        def build() -> int:
            return 3

        assert build() == 3
        assert __import__("numpy") is numpy
    assert importlib.util.find_spec("a_missing_logger") is None


def test_alias_leads_to_the_present_path() -> None:
    """An old module path that is gone leads to the named one, inside only."""
    with standing_in([], {"torch.old_home.parts": "torch.nn"}):
        from torch.old_home.parts import Linear

        assert Linear is nn.Linear
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torch.old_home.parts")


def test_attributes_are_set_where_modules_have_them() -> None:
    """An attribute reaches every module that has it; one that none has is an error."""
    from spikenm_fx.recipe.entry_point import Root

    def recipe(attributes: dict[str, object]) -> Recipe:
        return Recipe.model_validate(
            {
                "version": 1,
                "target": {
                    "package": "torch",
                    "build": "torch.nn:Dropout",
                    "attributes": attributes,
                },
                "inputs": {"shape": [1], "time": "none"},
            }
        )

    assert build_model(recipe({"p": 0.25}), Root()).p == 0.25
    with pytest.raises(RecipeError, match="no module of Dropout has 'pp'"):
        build_model(recipe({"pp": 1}), Root())


def test_extensions_and_torchscript_are_off_inside_only() -> None:
    """Files that compile kernels or script their classes import as plain Python, inside only."""
    from torch.utils import cpp_extension

    load, scripted = cpp_extension.load, torch.jit.ScriptModule
    with switched_off(["extensions", "torchscript"]):
        assert cpp_extension.load(name="wkv", sources=["gone.cu"]).forward() is not None

        class Mix(torch.jit.ScriptModule):
            @torch.jit.script_method
            def forward(self, x: object) -> object:
                return x

        assert Mix.__bases__ == (nn.Module,)
        assert Mix()(3) == 3
    assert cpp_extension.load is load
    assert torch.jit.ScriptModule is scripted


@tries(30)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**20))
def test_wkv_is_the_weighted_mean_of_the_past(
    batch: int, steps: int, channels: int, seed: int
) -> None:
    """The recurrence equals its definition, written as the sums it stands for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay, bonus = draw(channels), draw(channels)
    keys, values = draw(batch, steps, channels), draw(batch, steps, channels)
    found = wkv(batch, steps, channels, decay, bonus, keys, values)
    for t in range(steps):
        past = [torch.exp(keys[:, i] - (t - 1 - i) * decay.exp()) for i in range(t)]
        weights = torch.stack([*past, torch.exp(bonus + keys[:, t])], dim=1)
        wanted = (weights * values[:, : t + 1]).sum(1) / weights.sum(1)
        assert torch.allclose(found[:, t], wanted)


def test_wkv_does_not_overflow() -> None:
    """Keys whose exponential no float holds still give a mean of the values."""
    keys, values = torch.full((1, 3, 2), 500.0), torch.ones(1, 3, 2)
    zeros = torch.zeros(2)
    assert torch.allclose(wkv(1, 3, 2, zeros, zeros, keys, values), values)


def test_a_silent_network_is_roused() -> None:
    """Neurons that never fire do once their drivers are enlarged; a firing one stays as it was."""
    from spikenm_fx.demo.networks import LIF
    from spikenm_fx.recipe.waking import rouse
    from spikenm_fx.report.measure import report

    def net(scale: float) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), LIF(), nn.Linear(8, 8), LIF(), nn.Linear(8, 2))
        with torch.no_grad():
            for layer in model[::2]:
                layer.weight.mul_(scale)
        return model

    batch = torch.rand(3, 4, 8)

    def rates(model: nn.Module) -> dict[str, float]:
        return {neuron.name: neuron.rate for neuron in report(model, batch, batch_dim=1).neurons}

    silent = net(0.1)
    assert not any(rates(silent).values())
    rouse(silent, batch, lambda: rates(silent))
    assert all(rates(silent).values())
    awake, before = net(9.0), net(9.0).state_dict()
    assert all(rates(awake).values())
    rouse(awake, batch, lambda: rates(awake))
    assert all(torch.equal(value, before[key]) for key, value in awake.state_dict().items())
