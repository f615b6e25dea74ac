# SPDX-License-Identifier: Apache-2.0
"""The README's example: taken out, run as a user would, its output put back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from spikenm_fx.errors import SpikeNMError

__all__ = ["example_of", "printed_by", "with_output", "words"]

_BLOCKS = re.compile(r"```python\n(?P<code>.*?)```\n\n```text\n(?P<output>.*?)```", re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,]*")


def example_of(readme: str) -> tuple[str, str]:
    """Code and output of the first Python block that a text block follows.

    Raises:
        SpikeNMError: if there is none.
    """
    found = _BLOCKS.search(readme)
    if found is None:
        raise SpikeNMError("the README has no python block with a text block behind it")
    return found["code"], found["output"]


def printed_by(code: str, folder: Path) -> str:
    """What a file of this code prints, run by this interpreter on one thread, in ``folder``.

    Raises:
        SpikeNMError: if it fails or writes to standard error.
    """
    file = folder / "example.py"
    file.write_text(code, encoding="utf-8")
    # The package may be imported from the current folder alone; the example runs elsewhere.
    import spikenm_fx

    found = [str(Path(spikenm_fx.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, found)),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode or done.stderr:
        raise SpikeNMError(f"the README's example fails:\n{done.stderr}")
    return done.stdout


def with_output(readme: str, output: str) -> str:
    """The README's text with ``output`` in the block behind its example."""
    found = _BLOCKS.search(readme)
    assert found is not None
    return readme[: found.start("output")] + output + readme[found.end("output") :]


def words(output: str) -> list[list[str]]:
    """The words of each line, with ``#`` for figures: these differ from processor to processor."""
    lines = (re.sub("-{3,}", "---", _NUMBER.sub("#", line)) for line in output.splitlines())
    return [line.split() for line in lines]
