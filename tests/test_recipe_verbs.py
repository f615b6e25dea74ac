# SPDX-License-Identifier: Apache-2.0
"""What the shell does with recipes and models, called from Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spikenm_fx
from spikenm_fx import recipe
from spikenm_fx.demo.networks import LIF
from spikenm_fx.errors import PlanError, RecipeError

TEXT = """
version: 1
target: {{package: torch, build: 'torch.nn:Sequential', args:
  [{{call: 'torch.nn:Linear', args: [8, 8]}}, {{call: 'torch.nn:Linear', args: [8, 8]}},
   {{call: 'torch.nn:Linear', args: [8, 8]}}]}}
inputs: {{shape: [2, 8], time: none}}
expected: {{layers: 3, sparse: {sparse}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recipes, the second of which expects another plan."""
    (tmp_path / "a.yaml").write_text(TEXT.format(sparse=1))
    (tmp_path / "b.yaml").write_text(TEXT.format(sparse=2))
    return tmp_path


def test_check_records_what_became_of_each_recipe(folder: Path) -> None:
    """One result per recipe, in order; progress is told before each; JSON gives the same back."""
    told: list[tuple[str, int, int]] = []
    found = recipe.check(folder, progress=lambda *each: told.append(each))
    assert told == [("a", 0, 2), ("b", 1, 2)]
    assert [result.ok for result in found] == [True, False]
    assert "1 of 3 layers become sparse" in found[1].stages["plan"]
    again = recipe.CheckResult.from_dict(json.loads(json.dumps(found[0].to_dict())))
    assert again == found[0]


def test_check_refuses_what_it_cannot_read(folder: Path) -> None:
    """All mistakes of all files at once, and a root that is no folder."""
    (folder / "c.yaml").write_text("version: 2\n")
    (folder / "d.yaml").write_text("nm: 2:4\n")
    with pytest.raises(RecipeError, match=r"c\.yaml(.|\n)*d\.yaml"):
        recipe.check([folder])
    with pytest.raises(RecipeError, match="is not a folder"):
        recipe.check(folder / "a.yaml", folder / "gone")


def test_doctor_leaves_the_model_as_it_was() -> None:
    """Signals, kernels and advice for a fresh network, whose weights and mode do not change."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), LIF(), nn.Linear(16, 16), LIF(), nn.Linear(16, 4)).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = spikenm_fx.doctor(net, torch.rand(3, 2, 8), fresh=True)
    assert [layer.signal for layer in found.layers] == ["analog", "spike", "spike"]
    assert [layer.pattern for layer in found.layers] == [None, "2:4", None]
    assert found.layers[1].gain is not None
    assert found.runs is True
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert json.loads(json.dumps(found.to_dict()))["layers"][1]["feeds"] == ["3"]
    assert "N:M layers over dense" in str(found)


def test_doctor_without_an_input_and_on_a_wrong_one() -> None:
    """What is not known is said; what does not run too; a class is no model."""
    net = nn.Sequential(nn.Linear(8, 16), LIF(), nn.Linear(16, 16), LIF(), nn.Linear(16, 4))
    assert spikenm_fx.doctor(net).runs is None
    wrong = spikenm_fx.doctor(net, torch.rand(3, 2, 9))
    assert wrong.runs is False
    assert any("does not run" in text for text in wrong.blocked)
    with pytest.raises(PlanError, match=r"doctor\(\) needs an nn\.Module"):
        spikenm_fx.doctor(nn.Linear)


def test_a_loaded_model_plans_runs_and_reports(folder: Path) -> None:
    """By a recipe: its input, its plan, and a report that says what was made up."""
    loaded = recipe.load_model(folder / "a.yaml", nm="1:4")
    assert loaded.batch().shape == (2, 8)
    assert [str(entry.nm) for entry in loaded.plan().sparse] == ["1:4"] * len(loaded.plan().sparse)
    assert loaded.run(loaded.model, loaded.batch()).shape == (2, 8)
    assert any("noise" in note for note in loaded.report().notes)


FORGETS = """
import torch
from torch import nn

class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = torch.zeros(())

    def forget_all(self):
        self.v = torch.zeros(())

    def forward(self, x):
        self.v = self.v.detach() * 0.9 + x
        soft = torch.sigmoid(self.v - 0.1)
        return (self.v > 0.1).float() + soft - soft.detach()

def net():
    return nn.Sequential(nn.Linear(8, 16), Keeps(), nn.Linear(16, 16), Keeps(), nn.Linear(16, 4))

def rest(model):
    for module in model.modules():
        if isinstance(module, Keeps):
            module.forget_all()
"""


@pytest.mark.parametrize("reset", [None, "kept_state_for_check:rest"])
def test_state_that_stays_is_not_blamed_on_fold(tmp_path: Path, reset: str | None) -> None:
    """Where the reset is another method the check says which one; named, the recipe passes."""
    (tmp_path / "kept_state_for_check.py").write_text(FORGETS)
    (tmp_path / "net.yaml").write_text(
        "version: 1\n"
        "target: {repo: me/mine, commit: '0123456', build: 'kept_state_for_check:net'}\n"
        f"inputs: {{shape: [2, 8], time: none}}\nreset: {json.dumps(reset)}\n"
    )
    try:
        (found,) = recipe.check(tmp_path / "net.yaml", tmp_path)
    finally:
        sys.modules.pop("kept_state_for_check", None)
    if reset is None:
        assert "Keeps.forget_all" in found.stages["fold"]
        assert "the state of 1, 3" in found.stages["fold"]
        assert "folding changed" not in found.stages["fold"]
    else:
        assert found.stages["fold"] == "ok", found.stages
