# SPDX-License-Identifier: Apache-2.0
"""Recipes: what is accepted, and that every mistake is named at once, with its way out."""

from __future__ import annotations

import importlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from torch import nn

from spikenm_fx.errors import RecipeError
from spikenm_fx.masks.methods import METHODS, method_class
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.masks.sparsify import sparsify
from spikenm_fx.pattern import NM
from spikenm_fx.recipe.schema import load_recipe, parse_recipe, recipe_json_schema
from spikenm_fx.recipe.target import build_model, example_input, forward, reset_function, root_of
from spikenm_fx.recipe.yaml_strict import load_strict_yaml

GOOD = """
version: 1
name: tiny
target:
  package: torch
  build: "torch.nn:Sequential"
  args:
    - {call: "torch.nn:Linear", args: [8, 6]}
    - {call: "torch.nn:ReLU"}
    - {call: "torch.nn:Linear", kwargs: {in_features: 6, out_features: 3}}
inputs: {shape: [4, 8], time: none}
nm: "2:4"
rules:
  - {match: "re:.*", nm: "1:4", reason: "all of them"}
  - {match: "2", action: keep_dense, reason: "classifier"}
"""


def message_of(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="r.yaml")
    return str(caught.value)


def test_good_recipe_is_read_as_written() -> None:
    """A valid recipe keeps its rules in order, with patterns parsed."""
    recipe = parse_recipe(GOOD)
    assert [rule.match for rule in recipe.rules] == ["re:.*", "2"]
    assert recipe.rules[0].nm == NM(1, 4)
    assert recipe.nm == NM(2, 4)


def test_recipe_survives_a_round_trip() -> None:
    """Dumping a recipe as YAML and reading it again gives an equal recipe."""
    recipe = parse_recipe(GOOD)
    again = parse_recipe(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert again == recipe


def test_recipe_builds_and_runs_its_model() -> None:
    """The target of a recipe becomes a module that runs the recipe's input."""
    recipe = parse_recipe(GOOD)
    root = root_of(recipe)
    model = build_model(recipe, root)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    batch = example_input(recipe.inputs)
    assert torch.equal(batch, example_input(recipe.inputs))
    reset_function(recipe, root)(model)
    assert forward(model, batch, recipe.inputs).shape == (4, 3)


def test_unquoted_pattern_is_explained_with_its_fix() -> None:
    """YAML's base 60 is named, with the quoted text to write instead."""
    message = message_of(GOOD.replace('nm: "2:4"', "nm: 2:4"))
    assert "number 124" in message
    assert "quote it, '2:4'" in message
    assert "line 12, nm" in message


def test_all_mistakes_are_listed_at_once() -> None:
    """Each of several mistakes has its path, value, rule or near miss in one error."""
    text = (
        GOOD.replace("version: 1", "version: 3")
        .replace("name: tiny", "nmae: tiny")
        .replace("time: none", "time: lop")
        .replace('nm: "1:4"', 'nm: "4:1"')
        .replace("action: keep_dense", "action: keep_danse")
    )
    message = message_of(text)
    assert message.startswith("r.yaml: 5 mistakes")
    for part in (
        "version: 3 is not one of 1",
        "nmae: unknown key 'nmae'; did you mean 'name'?",
        "inputs.time: 'lop' is not one of",
        "did you mean 'loop'?",
        "rules[0].nm: pattern 4:1",
        "rules[1].action: 'keep_danse'",
        "did you mean 'keep_dense'?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: tiny", "name: tiny\nname: other", "'name' is given twice (first on line 3)"),
        ("name: tiny", "name: &n tiny\nnotes: *n", "*n is an alias"),
        ("name: tiny", "name: !!python/name:os.system", "tag !python/name:os.system"),
        ("name: tiny", "name: 2026-11-23", "reads as a date; quote it"),
        ("name: tiny", "name: 12", "12 must be text: quote it"),
        ("  package: torch", "\tpackage: torch", "a tab indents this line"),
        ("name: tiny", "name: a: b", "not valid YAML"),
        ("package: torch", "package: torch\n  repo: a/b", "either 'repo'"),
        ("package: torch", "repo: a/b", "needs the 'commit'"),
        ("package: torch", "package: torch\n  path: ../up", "inside the checkout"),
        ("torch.nn:Sequential", "torch.nn.Sequential", "not of the form 'package.module:Name'"),
        ("torch.nn:Sequential", "torch.nn:__import__", "not of the form"),
        ("re:.*", "re:(", "not a regular expression"),
        ("shape: [4, 8]", "shape: []", "inputs.shape"),
        ("shape: [4, 8]", "shape: [4, -8]", "inputs.shape[1]"),
        ("time: none", "time: loop", "'steps' belongs to time: loop"),
        ("action: keep_dense", "nm: '2:4', action: ignore", "contradict each other"),
        (', nm: "1:4"', "", "needs 'nm'"),
    ],
)
def test_each_mistake_says_what_to_do(old: str, new: str, expected: str) -> None:
    """One mistake gives one error that names it."""
    assert old in GOOD
    assert expected in message_of(GOOD.replace(old, new))


def test_anchor_bomb_is_refused_at_once() -> None:
    """A text whose aliases expand to 10^9 entries is refused before anything is built."""
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))
    assert "alias" in message_of("a0: &a0 [x]\n" + levels)


def test_deep_nesting_is_refused() -> None:
    """Thousands of brackets are a mistake of the file, not a RecursionError."""
    assert "nested deeper" in message_of("[" * 5000)


def test_huge_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 10 MB is refused by size, without being parsed."""
    path = tmp_path / "huge.yaml"
    path.write_text("a: 1\n" * 2_000_000)
    # spikenm_fx.plan is the verb; its package is found by import only
    module = importlib.import_module("spikenm_fx.recipe.schema")
    monkeypatch.setattr(module, "parse_recipe", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(path)


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"- a\n", b"\xff\xfe\x00", b"a"])
def test_what_is_no_recipe_is_a_recipe_error(tmp_path: Path, content: bytes) -> None:
    """Empty files, lists, binary and plain words are errors that name the file."""
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(path)


def test_missing_file_is_a_recipe_error(tmp_path: Path) -> None:
    """A path that does not exist, or is a folder, is an error that names it."""
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


@tries(200)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_gives_a_recipe_error(text: str) -> None:
    """No text makes the reader raise anything but RecipeError."""
    with pytest.raises(RecipeError):
        parse_recipe(text)


_scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab:2 4", max_size=5)
_data = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner),
    max_leaves=12,
)


@tries(200)
@given(_data)
def test_strict_yaml_agrees_with_safe_load(data: object) -> None:
    """Where the strict reader has nothing to say, it reads what PyYAML's safe loader reads."""
    text = yaml.safe_dump(data)
    found = load_strict_yaml(text)
    assert found.mistakes == ()
    assert found.data == yaml.safe_load(text)


@pytest.mark.slow
@tries(150)
@given(
    st.sampled_from(["version", "name", "target", "inputs", "nm", "rules"]),
    _data.filter(lambda value: value != []),
)
def test_wrong_values_are_named_by_their_key(key: str, value: object) -> None:
    """Whatever stands under a key, the error names that key or the recipe is valid."""
    data = yaml.safe_load(GOOD)
    data[key] = value
    message = ""
    try:
        parse_recipe(yaml.safe_dump(data))
    except RecipeError as error:
        message = str(error)
    assert not message or f" {key}" in message


def test_schema_is_json_and_closed() -> None:
    """The exported JSON Schema is serialisable, closed, and asks for quoted patterns."""
    schema = json.loads(json.dumps(recipe_json_schema()))
    assert schema["additionalProperties"] is False
    assert schema["properties"]["nm"]["type"] == "string"
    assert set(schema["required"]) == {"version", "target", "inputs"}
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


def method_of(text: str) -> str:
    return GOOD + f"method: {{{text}}}\n"


def test_options_reach_the_method() -> None:
    """A recipe can ask for strictly N:M training, whatever the default is."""
    chosen = parse_recipe(method_of("total_steps: 48000, options: {fade: 0.0, eid: null}"))
    method = chosen.sparsify_options()["method"]
    assert method == SpikeNM(fade=0.0, eid=None)
    assert method.schedule(48000, NM(1, 8)).undrawn_at(0) == 0.0
    assert parse_recipe(GOOD).sparsify_options()["method"] == SpikeNM()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    options = {**chosen.sparsify_options(), "rules": ()}
    sparsify(model, **options).train()(torch.rand(2, 8))
    assert int((model[1].weight.view(8, 2, 4) != 0).sum(-1).max()) <= 2


def test_mistakes_in_options_are_listed_at_once() -> None:
    """Unknown options with near misses, and values of another type, beside all other mistakes."""
    message = message_of(
        method_of(
            "total_steps: 0, options: {fadde: 0.0, std: x, relative: 1, eid: 3, prior: .inf, "
            "decay: [1]}"
        )
    )
    assert message.startswith("r.yaml: 7 mistakes")
    for part in (
        "method.total_steps: 0",
        "method.options.fadde: spikenm has no option 'fadde'; did you mean 'fade'?",
        "method.options.std: 'x' is not a number",
        "method.options.relative: 1 is not true or false",
        "method.options.eid: 3 is not null",
        "method.options.prior: inf is not a finite number",
        "method.options.decay: [1] is not a number or null",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: spikenn, options: {a: 1}", "method.name: method 'spikenn' is unknown"),
        ("name: magnitude, options: {fade: 0.0}", "magnitude has no option 'fade'; known: none"),
        ("total_steps: 5, options: {fade: 2.0}", "method.options.fade: fade=2.0"),
        ("options: 3", "method.options: 3"),
        ("options: {1: 3}", "1 must be text"),
    ],
)
def test_what_no_method_takes_is_refused(text: str, expected: str) -> None:
    """A wrong method, wrong options, and values out of the method's range are named."""
    assert expected in message_of(method_of(text))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_own_defaults_are_valid_options(name: str) -> None:
    """Every plain default of every method can be written down as an option."""
    plain = {
        each.name: each.default
        for each in fields(method_class(name))
        if isinstance(each.default, bool | int | float | str | None)
    }
    text = yaml.safe_dump({"method": {"name": name, "options": plain}})
    assert parse_recipe(GOOD + text).method.made() == method_class(name)()


def test_schema_of_options_takes_plain_values_only() -> None:
    """Editors complain about a list or a mapping as an option, and about nothing plain."""
    schema = recipe_json_schema()["$defs"]["MethodSpec"]["properties"]["options"]
    assert schema["type"] == "object"
    assert set(schema["additionalProperties"]["type"]) == {"number", "boolean", "string", "null"}
