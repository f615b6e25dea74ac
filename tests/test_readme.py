# SPDX-License-Identifier: Apache-2.0
"""The README is short, its links lead somewhere, and its example prints what it says."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import spikenm_fx
from spikenm_fx.bench.tables.example import example_of, printed_by, with_output, words
from spikenm_fx.errors import SpikeNMError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    """In an empty folder it prints the README's words, line by line, but for figures."""
    code, output = example_of(README)
    assert words(printed_by(code, tmp_path)) == words(output)


def test_the_example_needs_torch_alone() -> None:
    """Nothing but torch and this library is imported."""
    tree = ast.parse(example_of(README)[0])
    modules = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules == {"torch", "spikenm_fx"}


def test_other_words_are_noticed(tmp_path: Path) -> None:
    """The comparison forgives figures and column widths, and nothing else; failures are shown."""
    assert words("a  1.5 ms\n-----") == words("a 22,3 ms\n---------")
    assert words("a 1.5 ms") != words("a 1.5 s")
    assert words("a 1") != words("a 1\nb")
    text = with_output(README, "new\n")
    assert example_of(text) == (example_of(README)[0], "new\n")
    with pytest.raises(SpikeNMError, match="ZeroDivisionError"):
        printed_by("1 / 0", tmp_path)
    with pytest.raises(SpikeNMError, match="no python block"):
        example_of("# nothing")


def test_at_most_110_lines() -> None:
    """A page that is read, with the example on its first screen."""
    lines = README.splitlines()
    assert len(lines) <= 110
    assert lines.index("```python") < 12


def test_links_and_names_exist() -> None:
    """Every relative link leads to a file, every verb of the table is exported."""
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    verbs = re.findall(r"^\| \w+ \| `(\w+)\(", README, re.MULTILINE)
    assert len(verbs) == 8
    assert set(verbs) <= set(spikenm_fx.__all__)


def test_named_sessions_exist() -> None:
    """Every nox session that the README names is in the noxfile."""
    noxfile = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {node.name for node in noxfile.body if isinstance(node, ast.FunctionDef)}
    named = re.findall(r"-s ((?:[a-z]+ ?)+)", README)
    assert {name for words in named for name in words.split()} <= sessions


def test_the_stated_python_is_the_packages() -> None:
    """Installation names the Python that the package asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or later" in README
