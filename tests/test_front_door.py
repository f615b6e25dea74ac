# SPDX-License-Identifier: Apache-2.0
"""The names a user starts from: all there, typed, cheap to import, the same in every order."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from forks import failures

import spikenm_fx

ROOT = Path(__file__).parents[1]
VERBS = ("trace", "plan", "fold", "verify", "pack", "report", "doctor")


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_name_exists() -> None:
    """What __all__ promises is there, and dir() and the types that checkers see agree with it."""
    assert len(set(spikenm_fx.__all__)) == len(spikenm_fx.__all__)
    for name in spikenm_fx.__all__:
        assert getattr(spikenm_fx, name) is not None
    assert set(spikenm_fx.__all__) <= set(dir(spikenm_fx))
    tree = ast.parse((ROOT / "spikenm_fx" / "__init__.py").read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    names = {a.name: n.module for n in typed.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert sorted([*names, "__version__"]) == sorted(spikenm_fx.__all__)
    for name, module in names.items():
        assert getattr(sys.modules[str(module)], name) is getattr(spikenm_fx, name)


def test_the_version_is_that_of_the_project() -> None:
    """__version__ is what the build says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert spikenm_fx.__version__ == project["version"]


def test_what_is_not_there_says_so() -> None:
    """A name that is none is an AttributeError, an import of it an ImportError."""
    with pytest.raises(AttributeError, match="no attribute 'pakc'"):
        _ = spikenm_fx.pakc
    with pytest.raises(ImportError):
        from spikenm_fx import nothing  # noqa: F401


@pytest.mark.slow
def test_importing_brings_nothing_along() -> None:
    """Neither torch nor yaml is imported before a verb is used, and recipes alone need pydantic."""
    heavy = "('torch', 'networkx', 'pydantic', 'yaml', 'rich', 'typer')"
    show = f"print([m for m in {heavy} if m in sys.modules])"
    verbs = "spikenm_fx.pack, spikenm_fx.report, spikenm_fx.doctor"
    before, after = fresh(f"import sys, spikenm_fx; {show}; {verbs}; {show}").splitlines()
    assert before == "[]"
    assert "pydantic" not in after
    assert "yaml" not in after


def _verbs_after(first: str) -> str:
    """Code that imports each verb's module by ``first`` and then asks for the verb."""
    lines = ["import spikenm_fx, sys"]
    for verb in VERBS:
        lines.append(first.format(verb))
        lines.append(f"assert callable(spikenm_fx.{verb}), {verb!r}")
        lines.append(f"from spikenm_fx import {verb}; assert callable({verb})")
    lines += [
        "from spikenm_fx.pack import PackedLayer",
        "from spikenm_fx.pack.engine.layer import PackedLayer as same",
        "import spikenm_fx.pack.engine.lazy",
        "assert PackedLayer is same and callable(spikenm_fx.pack)",
        "assert spikenm_fx.masks.methods and spikenm_fx.recipe.check",
    ]
    return "\n".join(lines)


@pytest.mark.slow
def test_verbs_are_verbs_whatever_was_imported_before(tmp_path: Path) -> None:
    """A verb's name never becomes the module of that name, and both stay within reach."""
    ways = ["", "import spikenm_fx.{0}", "from spikenm_fx.{0} import *"]
    failed = failures([_verbs_after(first) for first in ways], tmp_path)
    assert dict(zip(ways, failed, strict=True)) == dict.fromkeys(ways, "")
