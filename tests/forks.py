# SPDX-License-Identifier: Apache-2.0
"""Processes of their own for tests, as forks of one that has imported what they need.

Importing torch and its compiler takes seconds of a processor; a fork takes none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

IMPORTED = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo"),
    *("torch.distributed.tensor.parallel", "torch.profiler", "networkx", "hypothesis", "pytest"),
    *("spikenm_fx.bench.worker", "spikenm_fx.bench.faults", "spikenm_fx.bench.peak"),
    *("spikenm_fx.trace.analysis.build", "spikenm_fx.report", "spikenm_fx.pack.api"),
)
"""What processes need, imported once: all are forks of a process that does nothing else."""


class Ended(NamedTuple):
    """A process that has ended: its status, negative for a signal, and what it wrote."""

    status: int | None
    out: str
    err: str


def _preloaded() -> None:
    multiprocessing.set_forkserver_preload(list(IMPORTED))


def started(run: Callable[..., None], *arguments: object, ranks: int) -> None:
    """``run(rank, *arguments)`` in one process each, until all of them have ended."""
    _preloaded()
    processes = torch.multiprocessing.start_processes
    processes(run, arguments, nprocs=ranks, start_method="forkserver")


def forked(run: Callable[..., object], *arguments: object, **environment: str) -> Ended:
    """``run(*arguments)`` in a process with more ``environment``, until it has ended.

    Nothing was computed in it: kernels, for one, are looked for when they are first asked for.
    """
    _preloaded()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_told, args=(run, arguments, environment, files))
        process.start()
        process.join()
        out, err = (f.read_text(encoding="utf-8", errors="replace") for f in files)
    return Ended(process.exitcode, out, err)


def _told(
    run: Callable[..., object], arguments: tuple, environment: dict[str, str], files: list[Path]
) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        with file.open("wb") as opened:  # by number: forks and other languages write there, too
            os.dup2(opened.fileno(), stream.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)  # a fork has no threads but the one that forks
    run(*arguments)


_IN_FORKS = """
import importlib, json, os, sys, torch, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
torch.set_num_threads(1)  # a fork has no threads but the one that forks
for number, code in enumerate(json.load(open("codes.json"))):
    child = os.fork()
    if not child:
        said = ""
        try:
            exec(code, {})
        except BaseException:
            said = traceback.format_exc()
        with open(f"{number}.txt", "w") as file:
            file.write(said)
        os._exit(0)
    os.waitpid(child, 0)
"""


def failures(codes: Sequence[str], folder: Path, *imported: str) -> list[str]:
    """How each piece of code fails in an interpreter that has imported torch alone; else empty.

    Args:
        codes: each runs in a fork of one fresh interpreter.
        folder: in which they run.
        imported: what else the interpreter has imported, which several of them need.
    """
    (folder / "codes.json").write_text(json.dumps(list(codes)), encoding="utf-8")
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", _IN_FORKS, *imported]
    subprocess.run(words, cwd=folder, env=environment, check=True)
    files = [folder / f"{number}.txt" for number in range(len(codes))]
    return [f.read_text(encoding="utf-8") if f.exists() else "it died" for f in files]
