# SPDX-License-Identifier: Apache-2.0
"""``spikenm-fx recipe``: check recipes against the real code, start a new one, show one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from spikenm_fx.cli.common import EPILOG, Exit, Input, Json, Pattern, RootOption, Screen, shape_of
from spikenm_fx.errors import RecipeError

__all__ = ["recipes"]

recipes = typer.Typer(no_args_is_help=True, help="Recipes for models of other repositories.")


@recipes.command(epilog=EPILOG)
def show(
    file: Annotated[Path, typer.Argument(help="A recipe.")],
    as_json: Json = False,
) -> None:
    """Validate a recipe and show it; every mistake is listed at once."""
    from spikenm_fx.recipe import load_recipe

    recipe = load_recipe(file)
    Screen(as_json).result(recipe.model_dump(mode="json"), str(recipe))


@recipes.command(epilog=EPILOG)
def schema(as_json: Json = True) -> None:
    """Print the JSON Schema of recipes, for editors; it is JSON either way."""
    from spikenm_fx.recipe import recipe_json_schema

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
    screen, asked = Screen(as_json), shape_of(shape)
    if out is not None and out.exists() and not force:
        raise RecipeError(f"{out} exists; --force replaces it")
    with screen.working("building the model"):
        from spikenm_fx.checkpoint import write_atomically
        from spikenm_fx.recipe import draft_recipe, parse_recipe

        text = draft_recipe(target, shape=asked, root=root, nm=nm or "2:4")
    if out is None:
        screen.result({"recipe": text}, text.rstrip())
        return
    write_atomically(out, lambda part: part.write_text(text, encoding="utf-8"))
    origin = parse_recipe(text).target
    where = root if root is not None else None if origin.is_local or origin.package else Path()
    words = ["spikenm-fx", "recipe", "check", str(out)]
    words += ["--root", str(where)] if where is not None else []
    following = shlex.join(words)
    screen.result(
        {"recipe": text, "out": str(out), "next": following}, f"written: {out}\nnext: {following}"
    )


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
    as_json: Json = False,
) -> None:
    """Apply recipes to the real code; exit code 1 where one fails, 3 where all were skipped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from spikenm_fx._torch import quiet_triton
    from spikenm_fx.recipe import checking
    from spikenm_fx.recipe.results import check_table, renew_table, summary

    quiet_triton()
    screen = Screen(as_json)
    if schema_only:
        files = list(checking.load_recipes(checking.recipe_files(paths)))
        text = "\n".join(f"valid: {file}" for file in files)
        screen.result({"valid": [str(file) for file in files]}, text)
        return
    if table is not None:  # now, not after an hour
        check_table(table)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=screen.err, transient=True) as progress:
        task = progress.add_task("recipes", total=None)
        found = checking.check(
            paths,
            root,
            apart=not here,
            progress=lambda name, done, total: progress.update(
                task, description=name, completed=done, total=total
            ),
        )
    results = [result.to_dict() for result in found]
    if table is not None:
        renew_table(table, results)
    screen.result(results, summary(results))
    if any(not result["ok"] and not result["skipped"] for result in results):
        raise typer.Exit(Exit.NO)
    if all(result["skipped"] for result in results):
        screen.err.print("nothing was tried: install the packages, or give the checkouts by --root")
        raise typer.Exit(Exit.INPUT)
