# SPDX-License-Identifier: Apache-2.0
"""Entry points: only code of the allowed root, never anything else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from spikenm_fx.errors import RecipeError
from spikenm_fx.recipe.entry_point import EntryPoint, Root
from spikenm_fx.recipe.schema import parse_recipe
from spikenm_fx.recipe.target import build_model, example_input, find_checkout, forward, root_of


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder of code as somebody's repository would be."""
    folder = tmp_path / "owner+net_repo"
    (folder / "net_pkg_for_test").mkdir(parents=True)
    (folder / "net_pkg_for_test" / "__init__.py").write_text("")
    (folder / "net_pkg_for_test" / "net.py").write_text(
        "import os\nfrom os import system\nfrom torch import nn\n"
        "from torch.hub import load\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width=8, act=nn.ReLU):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(width, 4)\n"
        "        self.act = act()\n"
        "    def forward(self, x):\n"
        "        return self.act(self.fc(x))\n"
        "def broken():\n    raise OSError('no data set')\n"
        "def not_a_module():\n    return 3\n"
        "table = {}\n"
    )
    (folder / "net_pkg_for_test" / "needs.py").write_text("import a_package_nobody_has\n")
    (folder / "net_pkg_for_test" / "bad.py").write_text("1 / 0\n")
    yield folder
    for name in [name for name in sys.modules if name.startswith("net_pkg_for_test")]:
        del sys.modules[name]


def test_class_of_the_checkout_is_found_and_path_restored(checkout: Path) -> None:
    """A class inside the root resolves, and sys.path is as before afterwards."""
    before = list(sys.path)
    found = Root(checkout).resolve("net_pkg_for_test.net:Net")
    assert issubclass(found, nn.Module)
    assert sys.path == before


@pytest.mark.parametrize(
    "text",
    [
        "os:system",
        "subprocess:run",
        "builtins:eval",
        "net_pkg_for_test.net:os.system",
        "net_pkg_for_test.net:system",
        "net_pkg_for_test.net:os",
        "net_pkg_for_test.net:load",
        "net_pkg_for_test.net:table",
        "torch.hub:load",
        "torch:load",
        "torch.nn.functional:os",
        "yaml:unsafe_load",
    ],
)
def test_code_outside_the_root_is_refused(checkout: Path, text: str) -> None:
    """Neither a foreign module nor a foreign object behind an allowed module can be named."""
    with pytest.raises(RecipeError):
        Root(checkout).resolve(text)


def test_module_outside_the_root_is_not_even_imported(checkout: Path, tmp_path: Path) -> None:
    """The refusal comes before any code of the foreign module runs."""
    (tmp_path / "evil_module_for_test.py").write_text("raise SystemExit('was imported')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(RecipeError, match="outside the allowed root"):
            Root(checkout).resolve("evil_module_for_test:run")
    finally:
        sys.path.remove(str(tmp_path))


def test_link_that_leaves_the_root_is_refused(checkout: Path, tmp_path: Path) -> None:
    """A symbolic link inside the checkout does not widen the root."""
    (tmp_path / "outside_for_test.py").write_text("def f():\n    return 1\n")
    (checkout / "outside_for_test.py").symlink_to(tmp_path / "outside_for_test.py")
    with pytest.raises(RecipeError, match="outside the allowed root"):
        Root(checkout).resolve("outside_for_test:f")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net_pkg_for_test.net:Nett", "near: Net"),
        ("net_pkg_for_test.nett:Net", "no module 'net_pkg_for_test.nett'"),
        ("net_pkg_for_test.needs:Net", "needs the package 'a_package_nobody_has'"),
        ("net_pkg_for_test.bad:Net", "ZeroDivisionError"),
        ("nobody_has_this:Net", "give the checkout's folder"),
    ],
)
def test_failures_name_the_cause(checkout: Path, text: str, expected: str) -> None:
    """A wrong name, a missing package and a raising module are told apart."""
    with pytest.raises(RecipeError, match=expected):
        Root(checkout).resolve(text)


@pytest.mark.parametrize("text", ["", "a", "a:b()", "a:b[0]", "a b:c", "a:_private", "a.b:c.__d"])
def test_other_forms_are_refused(text: str) -> None:
    """Only dotted public names have the form of an entry point."""
    with pytest.raises(RecipeError, match="not of the form"):
        EntryPoint.parse(text)


def recipe_text(build: str, kwargs: str = "{}") -> str:
    return (
        "version: 1\n"
        "target: {repo: owner/net_repo, commit: abcdef1, "
        f"build: '{build}', kwargs: {kwargs}}}\n"
        "inputs: {shape: [2, 16], time: none}\n"
    )


def test_model_is_built_from_a_folder_of_checkouts(checkout: Path) -> None:
    """The folder of checkouts and the checkout itself both serve as root; arguments resolve."""
    recipe = parse_recipe(
        recipe_text("net_pkg_for_test.net:Net", "{width: 16, act: {ref: 'torch.nn:Sigmoid'}}")
    )
    assert find_checkout("owner/net_repo", checkout.parent) == checkout
    for folder in (checkout.parent, checkout):
        model = build_model(recipe, root_of(recipe, folder))
        assert isinstance(model.act, nn.Sigmoid)
        assert model.fc.in_features == 16


@pytest.mark.parametrize(
    ("build", "kwargs", "expected"),
    [
        ("net_pkg_for_test.net:Net", "{wdth: 16}", "its parameters: "),
        ("net_pkg_for_test.net:broken", "{}", "OSError: no data set"),
        ("net_pkg_for_test.net:not_a_module", "{}", "returned a int"),
        ("net_pkg_for_test.net:Net", "{act: {ref: 'os:system'}}", "outside the allowed root"),
        ("net_pkg_for_test.net:Net", "{act: {ref: 'torch.nn:ReLU', args: []}}", "give one of"),
    ],
)
def test_build_failures_are_recipe_errors(
    checkout: Path, build: str, kwargs: str, expected: str
) -> None:
    """What a constructor raises reaches the user with the call and its parameters."""
    recipe = parse_recipe(recipe_text(build, kwargs))
    with pytest.raises(RecipeError, match=expected):
        build_model(recipe, root_of(recipe, checkout))


def test_recipe_without_its_checkout_says_what_to_clone(tmp_path: Path) -> None:
    """A repository recipe names the repository and commit when no checkout is given."""
    recipe = parse_recipe(recipe_text("net_pkg_for_test.net:Net"))
    with pytest.raises(RecipeError, match=r"owner/net_repo .* abcdef1"):
        root_of(recipe)
    with pytest.raises(RecipeError, match="no checkout of owner/net_repo"):
        root_of(recipe, tmp_path)


def test_a_function_of_the_checkout_can_be_replaced(checkout: Path) -> None:
    """The checkout's kernel gives way to the named one; nobody else's function can."""
    from spikenm_fx.recipe.rwkv import wkv

    text = recipe_text("net_pkg_for_test.net:Net").replace(
        "kwargs: {}", "kwargs: {}, replacements: {'net_pkg_for_test.net:broken': '%s'}"
    )
    recipe = parse_recipe(text % "spikenm_fx.recipe.rwkv:wkv")
    build_model(recipe, root_of(recipe, checkout))
    assert sys.modules["net_pkg_for_test.net"].broken is wkv
    for old, new in (
        ("torch.nn.functional:relu", "spikenm_fx.recipe.rwkv:wkv"),
        ("net_pkg_for_test.net:Net.forward", "spikenm_fx.recipe.rwkv:wkv"),
        ("net_pkg_for_test.net:not_a_module", "os:system"),
        ("net_pkg_for_test.net:none_such", "spikenm_fx.recipe.rwkv:wkv"),
    ):
        with pytest.raises(RecipeError):
            Root(checkout).replace(old, new)
    assert nn.functional.relu is not wkv


def test_output_of_an_inner_module_counts_where_named(checkout: Path) -> None:
    """A model that returns only a loss, or nothing, is judged by the module the recipe names."""
    recipe = parse_recipe(
        recipe_text("net_pkg_for_test.net:Net", "{width: 16}").replace(
            "time: none", "time: none, output: fc"
        )
    )
    model = build_model(recipe, root_of(recipe, checkout))
    batch = example_input(recipe.inputs)
    assert torch.equal(forward(model, batch, recipe.inputs), model.fc(batch))
    assert not model.fc._forward_hooks
