# SPDX-License-Identifier: Apache-2.0
"""Run every tutorial from top to bottom, each in a process of its own, and say how long it took."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spikenm_fx.bench.measure import positive

__all__ = ["main"]


def main(arguments: Sequence[str] = ()) -> int:
    """``python -m spikenm_fx.bench tutorials [NAME ...]``; exit status 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.bench tutorials")
    parser.add_argument("names", nargs="*", help="parts of file names; all tutorials by default")
    parser.add_argument("--folder", type=Path, default=Path("tutorials"))
    parser.add_argument("--jobs", type=positive, default=1, help="how many run side by side")
    given = parser.parse_args(list(arguments))
    files = sorted(given.folder.glob("[0-9][0-9]_*.py"))
    if given.names:
        files = [file for file in files if any(name in file.name for name in given.names)]
    if not files:
        print(f"no tutorials in {given.folder.resolve()}")
        return 1
    with ThreadPoolExecutor(given.jobs) as pool:
        failed = [f.name for f, ran in zip(files, pool.map(_run, files), strict=True) if not ran]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _run(file: Path) -> bool:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(file)], check=False, capture_output=True, text=True)
    verdict = "ok" if done.returncode == 0 else "FAILED"
    print(f"{verdict:7} {file.name:40} {time.perf_counter() - started:6.1f} s", flush=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
    return done.returncode == 0
