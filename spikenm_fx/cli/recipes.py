# SPDX-License-Identifier: Apache-2.0
"""``spikenm-fx recipe``: check recipes against the real code, start a new one, show one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spikenm_fx.cli.common import EPILOG, Exit, Input, Json, Pattern, RootOption, Screen
from spikenm_fx.errors import RecipeError

if TYPE_CHECKING:
    from spikenm_fx.recipe.schema import Recipe

__all__ = ["recipes"]

recipes = typer.Typer(no_args_is_help=True, help="Recipes for models of other repositories.")

_LIMIT_S = 900


@recipes.command(epilog=EPILOG)
def show(
    file: Annotated[Path, typer.Argument(help="A recipe.")],
    as_json: Json = False,
) -> None:
    """Validate a recipe and show it; every mistake is listed at once."""
    from spikenm_fx.recipe.schema import load_recipe

    recipe = load_recipe(file)
    Screen(as_json).result(recipe.model_dump(mode="json"), _page(recipe))


@recipes.command(epilog=EPILOG)
def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of recipes, for editors; it is JSON either way."""
    from spikenm_fx.recipe.schema import recipe_json_schema

    Screen(as_json).json(recipe_json_schema())


@recipes.command(epilog=EPILOG)
def init(
    target: Annotated[str, typer.Argument(help="module:Class of the model.")],
    shape: Input = None,
    root: RootOption = None,
    nm: Pattern = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented recipe for your own model, from its plan."""
    from spikenm_fx.checkpoint import write_atomically
    from spikenm_fx.recipe.draft import draft_recipe

    screen = Screen(as_json)
    if out is not None and out.exists() and not force:
        raise RecipeError(f"{out} exists; --force replaces it")
    with screen.working("building the model"):
        text = draft_recipe(target, shape=shape, root=root, nm=nm or "2:4")
    if out is None:
        screen.result({"recipe": text}, text.rstrip())
        return
    write_atomically(out, lambda part: part.write_text(text, encoding="utf-8"))
    screen.result({"recipe": text, "out": str(out)}, f"written: {out}")


@recipes.command(epilog=EPILOG)
def check(
    paths: Annotated[list[Path], typer.Argument(help="Recipes, or folders of them.")],
    root: RootOption = None,
    schema_only: Annotated[
        bool, typer.Option("--schema-only", help="Validate the files, build nothing.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="Markdown file whose table of results is renewed.")
    ] = None,
    here: Annotated[
        bool, typer.Option("--in-process", help="No process of its own for each recipe.")
    ] = False,
    result: Annotated[
        Path | None, typer.Option(hidden=True, help="File for the results of one process.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Apply recipes to the real code; exit code 1 where one fails, 3 where all were skipped."""
    from spikenm_fx.recipe.results import check_table, renew_table
    from spikenm_fx.recipe.schema import load_recipe

    screen = Screen(as_json)
    files = _files(paths)
    loaded, broken = {}, []
    for file in files:
        try:
            loaded[file] = load_recipe(file)
        except RecipeError as error:
            broken.append(str(error))
    if broken:
        raise RecipeError("\n".join(broken))
    if schema_only:
        text = "\n".join(f"valid: {file}" for file in files)
        screen.result({"valid": [str(file) for file in files]}, text)
        return
    if root is not None and not root.is_dir():
        raise RecipeError(f"the root {root} is not a folder")
    if table is not None:  # now, not after an hour
        check_table(table)
    results = _checked(loaded, root, here, screen)
    if result is not None:
        result.write_text(json.dumps(results), encoding="utf-8")
        return
    if table is not None:
        renew_table(table, results)
    screen.result(results, _summary(results))
    if any(not result["ok"] and not result["skipped"] for result in results):
        raise typer.Exit(Exit.NO)
    if all(result["skipped"] for result in results):
        screen.err.print("nothing was tried: install the packages, or give the checkouts by --root")
        raise typer.Exit(Exit.INPUT)


def _files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
        if not found:
            raise RecipeError(f"{path} holds no recipe (*.yaml)")
        files += found
    return files


def _checked(
    loaded: dict[Path, Recipe], root: Path | None, here: bool, screen: Screen
) -> list[dict[str, Any]]:
    from spikenm_fx.recipe.check import check_recipe

    results: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=screen.err, transient=True) as progress:
        task = progress.add_task("recipes", total=len(loaded))
        for file, recipe in loaded.items():
            progress.update(task, description=file.stem)
            if here:
                results.append(check_recipe(recipe, file.stem, root).to_dict())
            else:
                results.append(_checked_apart(file, recipe, root))
            progress.advance(task)
    return results


def _checked_apart(file: Path, recipe: Recipe, root: Path | None) -> dict[str, Any]:
    """In a process of its own: every repository has a ``models`` package, and only one can be."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, "-m", "spikenm_fx.cli", "recipe", "check", str(file)]
        words += ["--in-process", "--result", str(out)]
        words += ["--root", str(root)] if root is not None else []
        search = {**os.environ, "PYTHONPATH": _search_path(recipe, root)}
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, check=False, timeout=_LIMIT_S, env=search
            )
        except subprocess.TimeoutExpired:
            return _no_result(file, recipe, f"it took more than {_LIMIT_S} s")
        if not out.is_file():
            return _no_result(
                file, recipe, f"its process ended without a result: {done.stderr[-300:]}"
            )
        found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
        return found[0]


def _no_result(file: Path, recipe: Recipe, reason: str) -> dict[str, Any]:
    from spikenm_fx.recipe.check import CheckResult

    origin = recipe.target.repo or recipe.target.package or ""
    result = CheckResult(file.stem, recipe.name or file.stem, origin)
    result.stages["build"] = f"failed: {reason}"
    return result.to_dict()


def _search_path(recipe: Recipe, root: Path | None) -> str:
    """The current path, and before it the packages of other versions that the root provides."""
    from spikenm_fx.recipe.target import provided

    return os.pathsep.join(filter(None, [*provided(recipe, root), os.environ.get("PYTHONPATH")]))


def _summary(results: list[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        verdict = "skipped" if result["skipped"] else "ok" if result["ok"] else "FAILED"
        layers = f"{result['sparse']}/{result['layers']} layers" if result["layers"] else ""
        firing = "{} of {} neurons fire".format(*result["firing"]) if result["firing"] else ""
        name, seconds = result["recipe"], result["seconds"]
        lines.append(f"{verdict:8} {name:34} {layers:16} {firing:24} {seconds:6.1f} s")
        for stage, text in result["stages"].items():
            if text != "ok":
                lines.append(f"         {stage}: {text}")
    skipped = sum(result["skipped"] for result in results)
    ok = sum(result["ok"] and not result["skipped"] for result in results)
    lines.append(f"{ok} ok, {len(results) - ok - skipped} failed, {skipped} skipped")
    return "\n".join(lines)


def _page(recipe: Recipe) -> str:
    target, inputs = recipe.target, recipe.inputs
    origin = f"{target.repo} at {target.commit}" if target.repo else f"package {target.package}"
    rules = [
        f"  {rule.match}  ->  {rule.nm or rule.action}"
        + (f"  ({rule.reason})" if rule.reason else "")
        for rule in recipe.rules
    ]
    lines = [
        f"{recipe.name or target.build}",
        f"origin   {origin}",
        f"build    {target.build}",
        f"needs    {', '.join(target.requires) or 'nothing further'}",
        f"input    {inputs.kind} {inputs.shape}, time {inputs.time}"
        + (f" x {inputs.steps}" if inputs.steps else ""),
        f"reset    {recipe.reset or 'none'}",
        f"pattern  {recipe.nm.describe()}, remainder: {recipe.remainder}",
        f"method   {recipe.method.name}"
        + "".join(f", {option}: {value}" for option, value in recipe.method.options.items()),
        *(["rules    ordered, the first match wins", *rules] if rules else []),
        *([f"notes    {recipe.notes}"] if recipe.notes else []),
    ]
    return "\n".join(lines)
