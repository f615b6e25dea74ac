# SPDX-License-Identifier: Apache-2.0
"""Write the page of all figures, and the README's few, from what was measured.

To add a table: let the benchmark save its JSON file (:func:`spikenm_fx.bench.measure.save`), and
add a :class:`~spikenm_fx.bench.tables.chapter.Chapter` to ``learning``, ``channels``, ``speed`` or
``reading``.  For plain rows :func:`~spikenm_fx.bench.tables.chapter.columns` is the whole body::

    Chapter(
        "Kernel launches of a training step",
        ("launches",),
        "python -m spikenm_fx.bench launches",
        columns(pattern="", launches=",", host_syncs=","),
    )

``--example`` also runs the README's example and puts what it prints behind it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spikenm_fx.bench.measure import RESULTS
from spikenm_fx.bench.tables.example import example_of, printed_by, with_output
from spikenm_fx.bench.tables.page import page, with_headlines

__all__ = ["main", "written"]


def main(arguments: Sequence[str] = ()) -> int:
    """Write both files; with ``--check`` write nothing, and exit with 1 where they differ."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.bench tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say which files differ")
    parser.add_argument("--example", action="store_true", help="renew the example's output")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=RESULTS.parents[2] / "README.md")
    options = parser.parse_args(arguments)
    if options.example and not options.check:
        text = options.readme.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            text = with_output(text, printed_by(example_of(text)[0], Path(folder)))
        options.readme.write_text(text, encoding="utf-8")
    differing = [
        (path, text)
        for path, text in written(options.results, options.readme).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in differing:
        if options.check:
            print(f"{path} differs from the measurements", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(path)
    return int(options.check and bool(differing))


def written(results: Path, readme: Path) -> dict[Path, str]:
    """What both files must hold: the page beside the JSON files, and the README.

    Args:
        results: folder of the JSON files.
        readme: a file with the two marks of :mod:`spikenm_fx.bench.tables.page`.

    Raises:
        SpikeNMError: for missing or unknown files, or a README without the marks.
    """
    renewed = with_headlines(readme.read_text(encoding="utf-8"), results)
    return {results / "README.md": page(results), readme: renewed}
