# SPDX-License-Identifier: Apache-2.0
"""Docstrings say something: words, shapes of tensors, and what is raised; read by ``ast``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spikenm_fx"
FILES = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if not any(part.startswith("_") and part != "__init__.py" for part in file.parts)
]
LEAST_WORDS = 3
NO_RAISES = "raises and has no Raises section"
SHAPE = re.compile(r"shape|[\[(][A-Z*.][^\])]*[\])]|scalar|elementwise|one number|any tensor", re.I)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public classes, functions and methods, with their qualified names."""
    for node in getattr(tree, "body", ()):
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def faults(source: str, *, is_help: bool = False) -> dict[str, str]:
    """What is wrong with the docstrings of a file, by qualified name.

    Those of commands are their ``--help``: exit codes stand there instead of exceptions.
    """
    found = {}
    for name, node in public(ast.parse(source)):
        fault = _fault(node, ast.get_docstring(node) or "")
        if fault and not (is_help and fault == NO_RAISES):
            found[name] = fault
    return found


def _fault(node: ast.AST, text: str) -> str:
    if _is_overload(node):
        return ""
    if len(text.split()) < LEAST_WORDS:
        return f"says nothing: {text!r}"
    if not isinstance(node, Function):
        return ""
    if _takes_tensors(node) and not SHAPE.search(text):
        return "takes tensors and names no shape"
    if _raises(node) and "Raises:" not in text:
        return NO_RAISES
    return ""


def _is_overload(node: ast.AST) -> bool:
    return any("overload" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))


def _takes_tensors(node: Function) -> bool:
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return any(a.annotation and re.search(r"\bTensor\b", ast.unparse(a.annotation)) for a in given)


def _raises(node: Function) -> bool:
    """Whether its own body raises; not what it defines inside, nor an error passed on."""
    waiting = list(node.body)
    while waiting:
        child = waiting.pop()
        if isinstance(child, ast.Raise) and child.exc is not None:
            return "NotImplementedError" not in ast.unparse(child.exc)
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(child)
    return False


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_docstrings_of(file: Path) -> None:
    """Every public function says what it does, which shapes it takes and what it raises."""
    found = faults(file.read_text(encoding="utf-8"), is_help=file.parent.name == "cli")
    assert found == {}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('def ones(x):\n    """Ones."""', "says nothing: 'Ones.'"),
        ("def f(x):\n    pass", "says nothing: ''"),
        ('class Big:\n    """Big."""', "says nothing: 'Big.'"),
        ('def f(x: Tensor):\n    """The largest of all values."""', "takes tensors and names no"),
        ('def f(x):\n    """Half of an even one."""\n    if x:\n        raise E(x)', NO_RAISES),
    ],
)
def test_faults_are_found(source: str, fault: str) -> None:
    """Each kind of empty docstring is seen."""
    ((_, found),) = faults(source).items()
    assert fault in found


@pytest.mark.parametrize(
    "source",
    [
        'def _private(x: Tensor):\n    """X."""\n    raise E',
        'def f(x: Tensor):\n    """``[T, ...]`` currents to spikes of the same."""',
        'def f(x):\n    """Half of it.\n\n    Raises:\n        E: if odd.\n    """\n    raise E(x)',
        'def f(x):\n    """Hands it on."""\n    try:\n        g()\n    except E:\n        raise',
        'def f(x):\n    """One that raises."""\n    def g():\n        raise E(x)\n    return g',
    ],
)
def test_honest_docstrings_pass(source: str) -> None:
    """Shapes, Raises sections, private and inner functions, errors passed on."""
    assert faults(source) == {}
