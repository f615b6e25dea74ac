# SPDX-License-Identifier: Apache-2.0
"""The page of figures and the README's headlines say what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spikenm_fx.bench import tables
from spikenm_fx.bench.measure import RESULTS
from spikenm_fx.bench.tables.chapter import Chapter, columns, machine_of
from spikenm_fx.bench.tables.page import BEGIN, CHAPTERS, END, page
from spikenm_fx.errors import SpikeNMError

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def copied(tmp_path: Path) -> list[str]:
    """Options that point the command at copies, as they stand in the repository."""
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    shutil.copy(README, tmp_path / "README.md")
    return ["--results", str(results), "--readme", str(tmp_path / "README.md")]


def test_pages_hold_what_was_measured(capsys) -> None:
    """Both files are what ``bench tables`` writes from the JSON files beside them."""
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_a_new_measurement_is_noticed_and_written(
    copied: list[str], tmp_path: Path, capsys
) -> None:
    """A figure that changes makes ``--check`` name both pages; writing renews both."""
    path = tmp_path / "results" / "step.json"
    result = json.loads(path.read_text())
    result["summary"]["fc2048, spikenm 2:4"]["after"] = 98.76
    (row,) = (row for row in result["rows"] if row["key"] == "fc2048, spikenm 2:4")
    row["after"]["over_dense"]["a run's mean"] = 98.76
    path.write_text(json.dumps(result))
    assert tables.main([*copied, "--check"]) == 1
    assert capsys.readouterr().err.count("README.md differs") == 2
    assert tables.main(copied) == 0
    assert "98.76x" in (tmp_path / "README.md").read_text()
    assert "98.76" in (tmp_path / "results" / "README.md").read_text()
    assert tables.main([*copied, "--check"]) == 0


def test_text_around_the_headlines_stays(copied: list[str], tmp_path: Path) -> None:
    """Only what stands between the two marks is written anew."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    tables.main(copied)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


def test_every_measurement_has_its_chapter(copied: list[str], tmp_path: Path) -> None:
    """A result that no chapter reads is an error, as is a missing one; neither is passed over."""
    (tmp_path / "results" / "new.json").write_text("{}")
    with pytest.raises(SpikeNMError, match=r"new\.json.*add a Chapter"):
        page(tmp_path / "results")
    (tmp_path / "results" / "new.json").unlink()
    (tmp_path / "results" / "step.json").unlink()
    with pytest.raises(SpikeNMError, match=r"step\.json cannot be read"):
        tables.main(copied)


def test_a_readme_without_marks_is_refused(copied: list[str], tmp_path: Path) -> None:
    """Nothing is written then."""
    (tmp_path / "README.md").write_text("no marks")
    page_before = (tmp_path / "results" / "README.md").read_text()
    with pytest.raises(SpikeNMError, match="lacks the marks"):
        tables.main(copied)
    assert (tmp_path / "README.md").read_text() == "no marks"
    assert (tmp_path / "results" / "README.md").read_text() == page_before


def test_a_plain_table_is_one_line() -> None:
    """``columns`` makes a table of rows, whether they are a list or named."""
    body = columns(name="", step_launches=",")
    listed = {"rows": [{"name": "fc", "step_launches": 1234}]}
    named = {"rows": {"fc": {"step_launches": 1234}}}
    assert body(listed) == body(named)
    assert body(listed).splitlines() == [
        "| name | step launches |",
        "| --- | --- |",
        "| fc | 1,234 |",
    ]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.title)
def test_figures_carry_their_machine(chapter: Chapter) -> None:
    """Every file of a chapter says where it was measured, or at least with which torch."""
    for name in chapter.files:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        assert "torch 2." in machine_of(result)
