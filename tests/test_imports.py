# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: no arrow of the packages runs up, no circle among modules, no private torch."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spikenm_fx

ROOT = Path(spikenm_fx.__file__).parent
LAYERS = (
    "errors _lazy table",
    "_torch",
    "pattern",
    "state surgery native checkpoint distributed_checkpoint",
    "trace",
    "plan",
    "channels",
    "masks",
    "fold verify pack permute program",
    "export",
    "lottery report",
    "budget recipe doctor",
    "demo",
    "bench",
    "cli",
)
"""From the bottom up; packages of one line may use each other, as long as that makes no circle."""

RANK = {package: rank for rank, line in enumerate(LAYERS) for package in line.split()}

PRIVATE = re.compile(
    r"\b(from|import) torch(\.\w+)*\._|from torch[\w.]* import .*\b_[A-Za-z]"
    r"|\btorch(\.\w+)*\._[A-Za-z]"
    r"|from torch\._\w+|\b_(ConvNd|ConvTransposeNd|BatchNorm|NormBase|DropoutNd)\b"
    r"|\._(cdata|schema)\b"
)


def sources() -> Iterator[tuple[str, Path]]:
    """Every module, named without the package: ``trace.graph``; the package itself is ``""``."""
    for path in sorted(ROOT.rglob("*.py")):
        if "_packaging" not in path.parts:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix("__init__").rstrip("."), path


MODULES = dict(sources())


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports_of(path: Path, *, types: bool = True) -> set[str]:
    """The modules of this package that a file imports, anywhere in it; ``types``: for them too."""
    found = set()
    for node in _walk(parsed(path), types):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if _own(name) in MODULES else module for name in names]
        found |= {_own(name) for name in names if name.split(".")[0] == "spikenm_fx"}
    return found


def _walk(node: ast.AST, types: bool) -> Iterator[ast.AST]:
    """All that stands in ``node``; without ``types`` not what only type checkers run."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and not types and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.stmt | ast.Module | ast.ExceptHandler | ast.match_case):
            waiting += ast.iter_child_nodes(node)  # no expression holds an import


def _own(name: str) -> str:
    return name.removeprefix("spikenm_fx").removeprefix(".")


NAMES = sorted(MODULES.keys() - {""})


@functools.cache
def graph() -> dict[str, set[str]]:
    """What each module imports."""
    return {name: imports_of(MODULES[name]) - {name, ""} for name in NAMES}


@functools.cache
def running() -> dict[str, set[str]]:
    """The same without what only types need."""
    return {name: imports_of(MODULES[name], types=False) for name in NAMES}


def package(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("name", sorted(RANK.keys() & {package(m) for m in NAMES}))
def test_no_arrow_runs_up(name: str) -> None:
    """A package imports only what lies below it, for types too."""
    up = [
        f"{module} -> {target}"
        for module, targets in graph().items()
        if package(module) == name
        for target in sorted(targets)
        if RANK[package(target)] > RANK[name]
    ]
    assert up == []


def test_every_package_has_its_place() -> None:
    """A new package must be put into the order."""
    assert {package(module) for module in NAMES} - {"__main__"} <= RANK.keys()


def _first_circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_among_modules() -> None:
    """Imports inside functions count; those for types only count between packages.

    Among modules of one package a type-only import may point back, as a part names the whole that
    it is given: it does not exist when the program runs.
    """
    found = {
        name: {t for t in targets if t in running()[name] or package(t) != package(name)}
        for name, targets in graph().items()
    }
    assert _first_circle(found) == []


def _code(path: Path) -> Iterator[str]:
    """The lines of a file's statements, without docstrings and comments."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                statement
                for statement in body
                if not (
                    isinstance(statement, ast.Expr)
                    and isinstance(statement.value, ast.Constant)
                    and isinstance(statement.value.value, str)
                )
            ] or [ast.Pass()]
    yield from ast.unparse(tree).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_names_of_torch_stand_in_one_file(name: str) -> None:
    """``spikenm_fx._torch`` knows what to do where one is missing; nobody else names one."""
    path = MODULES[name]
    if name == "_torch":
        return
    assert [line for line in _code(path) if PRIVATE.search(line)] == []


NOTHING_PRIVATE = """
import importlib
real = importlib.import_module
hidden = ("utils._pytree", "utils._python_dispatch", "fx._symbolic_trace", "_compile", "_C",
          "_C._functorch", "nn.modules.conv", "nn.modules.batchnorm", "nn.modules.dropout")
def without(name, package=None):
    if name in [f"torch.{path}" for path in hidden]:
        raise ImportError(name)
    return real(name, package)
import torch
importlib.import_module = without
import spikenm_fx
from spikenm_fx import _torch
from spikenm_fx.errors import TorchVersionError
assert spikenm_fx.pattern.is_weight_layer(torch.nn.Conv2d(1, 1, 1))
assert spikenm_fx.pattern.is_weight_layer(torch.nn.ConvTranspose3d(1, 1, 1))
assert not spikenm_fx.pattern.is_weight_layer(torch.nn.BatchNorm2d(1))
assert isinstance(torch.nn.Dropout2d(), _torch.DropoutBase)
assert isinstance(torch.nn.InstanceNorm1d(1), _torch.NormBase)
assert spikenm_fx.NM(2, 4).density == 0.5
try:
    spikenm_fx.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
except TorchVersionError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_import_needs_no_private_name() -> None:
    """Where torch has none of them the package imports, finds layers, and says what is amiss."""
    run = [sys.executable, "-c", NOTHING_PRIVATE]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "does not work" in done.stdout


def test_what_needs_no_framework_is_not_marked(request: pytest.FixtureRequest) -> None:
    """Fixtures that all tests use name no framework, or the quick session would run nothing."""
    assert request.node.get_closest_marker("framework") is None
