# SPDX-License-Identifier: Apache-2.0
"""Check one recipe in a process of its own.

Every repository has a ``models`` package, and only one can be imported in a process; a model that
ends the interpreter must not end the check of the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from spikenm_fx.recipe.schema import Recipe, load_recipe
from spikenm_fx.recipe.target import provided
from spikenm_fx.recipe.trial import CheckResult, check_recipe, origin

__all__ = ["check_apart", "main"]

LIMIT_S = 900.0
"""Seconds that one recipe may take."""


def check_apart(
    file: Path, recipe: Recipe, root: Path | None, *, limit_s: float = LIMIT_S
) -> CheckResult:
    """What :func:`check_recipe` finds, from another process; whatever goes wrong there is recorded.

    Args:
        file: of the recipe.
        recipe: the same, read.
        root: folder of its code or of checkouts.
        limit_s: seconds after which the process is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, "-m", __name__, str(file), str(out)]
        words += [str(root)] if root is not None else []
        search = {**os.environ, "PYTHONPATH": _search_path(recipe, root)}
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, check=False, timeout=limit_s, env=search
            )
        except subprocess.TimeoutExpired:
            return _without_result(file, recipe, f"it took more than {limit_s:g} s")
        if not out.is_file():
            return _without_result(
                file, recipe, f"its process ended without a result: {done.stderr[-300:]}"
            )
        return CheckResult.from_dict(json.loads(out.read_text(encoding="utf-8")))


def main(arguments: list[str]) -> None:
    """``FILE OUT [ROOT]``: check the recipe in this process and write the result as JSON."""
    file, out = Path(arguments[0]), Path(arguments[1])
    root = Path(arguments[2]) if len(arguments) > 2 else None
    found = check_recipe(load_recipe(file), file.stem, root)
    out.write_text(json.dumps(found.to_dict()), encoding="utf-8")


def _without_result(file: Path, recipe: Recipe, reason: str) -> CheckResult:
    result = CheckResult(file.stem, recipe.name or file.stem, origin(recipe))
    result.stages["build"] = f"failed: {reason}"
    return result


def _search_path(recipe: Recipe, root: Path | None) -> str:
    """The current path, and before it the packages of other versions that the root provides."""
    return os.pathsep.join(filter(None, [*provided(recipe, root), os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    main(sys.argv[1:])
