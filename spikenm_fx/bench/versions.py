# SPDX-License-Identifier: Apache-2.0
"""This version and an earlier checkout, asked the same questions in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from spikenm_fx.bench import worker

__all__ = ["Version", "add_before", "versions"]


class Version:
    """A process that runs :mod:`spikenm_fx.bench.worker` with the package of one folder.

    Args:
        folder: that holds the package ``spikenm_fx``.
        threads: of torch.
        environment: on top of this process's.
    """

    def __init__(
        self, folder: Path, *, threads: int, environment: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {}), "PYTHONPATH": str(folder.resolve())},
        )
        self._write(str(threads))

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            OSError: if its process has ended.
        """
        self._write(json.dumps({"ask": name, **arguments}))
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(
                f"the process that measures {self.folder} ended (status {self._process.wait()}) "
                f"when asked for {name} {arguments}"
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Version:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def versions(before: Path | None) -> dict[str, Path]:
    """Folders of the versions to measure, by name.

    Args:
        before: a checkout of an earlier version, or None.

    Raises:
        OSError: if there is no package in it.
    """
    found = {"after": Path(__file__).parents[2]}
    if before is not None:
        if not (before / "spikenm_fx" / "__init__.py").is_file():
            raise OSError(f"{before} holds no package spikenm_fx: give a checkout's root")
        found = {"before": before, **found}
    return found


def add_before(parser: Any) -> None:
    """The option that names the earlier checkout."""
    parser.add_argument(
        "--before",
        type=Path,
        help="root of a checkout of an earlier version (git worktree add DIR REV), measured in "
        "turn with this one",
    )
