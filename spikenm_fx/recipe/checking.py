# SPDX-License-Identifier: Apache-2.0
"""Check recipes against the real code: one of them, a folder, or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from spikenm_fx.errors import RecipeError
from spikenm_fx.recipe.apart import check_apart
from spikenm_fx.recipe.schema import Recipe, load_recipe
from spikenm_fx.recipe.trial import CheckResult, check_recipe

__all__ = ["Progress", "check", "load_recipes", "recipe_files"]

Progress = Callable[[str, int, int], None]
"""Told before each recipe: its name, how many are done, how many there are."""


def check(
    paths: str | Path | Iterable[str | Path],
    root: str | Path | None = None,
    *,
    apart: bool = False,
    progress: Progress | None = None,
) -> list[CheckResult]:
    """Build, plan, sparsify, train a step, fold, verify and pack what recipes describe.

    Failures are recorded in the results, one for each recipe; recipes whose code is not on this
    machine are skipped, and say so.

    Args:
        paths: recipe files, or folders of them.
        root: the folder of their code, or of checkouts.
        apart: each in a process of its own: checkouts of several repositories need it, as their
            packages have the same names.
        progress: told before each recipe.

    Raises:
        RecipeError: listing every mistake of all files at once, or if the root is no folder.
    """
    folder = None if root is None else Path(root)
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"the root {folder} is not a folder")
    loaded = load_recipes(recipe_files(paths))
    results = []
    for done, (file, recipe) in enumerate(loaded.items()):
        if progress is not None:
            progress(file.stem, done, len(loaded))
        if apart:
            results.append(check_apart(file, recipe, folder))
        else:
            results.append(check_recipe(recipe, file.stem, folder))
    return results


def recipe_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The recipes among ``paths``: files as they are, of folders each ``*.yaml`` and ``*.yml``.

    Raises:
        RecipeError: for a folder that holds none.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    files: list[Path] = []
    for path in map(Path, listed):
        found = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
        if not found:
            raise RecipeError(f"{path} holds no recipe (*.yaml)")
        files += found
    return files


def load_recipes(files: Iterable[Path]) -> dict[Path, Recipe]:
    """The recipes by file.

    Raises:
        RecipeError: listing the mistakes of all files.
    """
    loaded, broken = {}, []
    for file in files:
        try:
            loaded[file] = load_recipe(file)
        except RecipeError as error:
            broken.append(str(error))
    if broken:
        raise RecipeError("\n".join(broken))
    return loaded
