# SPDX-License-Identifier: Apache-2.0
"""One row of a benchmark in a process of its own: modules of several repositories share names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["row_apart"]


def row_apart(
    bench: str, arguments: Sequence[str], *, seconds: float | None = None, scripted: bool = False
) -> Any:
    """What ``python -m spikenm_fx.bench BENCH ... --output FILE`` writes to that file.

    Args:
        bench: name of the benchmark.
        arguments: its options, but for the output.
        seconds: for the process, at most.
        scripted: whether torch's script compiler runs what a repository scripts.

    Returns:
        The file's content, read as JSON; a text instead says what went wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, "-m", "spikenm_fx.bench", bench, *arguments]
        command += ["--output", str(output)]
        environment = {**os.environ, "PYTORCH_JIT": str(int(scripted))}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"over {seconds} s"
        if not output.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no output"]
            return last[0][:160]
        return json.loads(output.read_text(encoding="utf-8"))
