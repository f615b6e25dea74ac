# SPDX-License-Identifier: Apache-2.0
"""Ranks that are killed, and disks that refuse: what is left, and what a run that goes on makes."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.bench.measure import positive, save
from spikenm_fx.bench.worker import fully_connected
from spikenm_fx.distributed_checkpoint import load_distributed, save_distributed
from spikenm_fx.errors import CheckpointError
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

__all__ = ["kills", "main", "refusals"]

RANKS, STEPS, EVERY, BATCH = 2, 24, 4, 8
TIMEOUT = timedelta(seconds=60)  # torch's own, of a rank that waits for one that is gone
NOBODY = 65534


def main(arguments: Sequence[str]) -> int:
    """Kill runs of two ranks at random moments, let disks refuse, write ``results/faults.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench faults", description=__doc__)
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder of the result")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # another user's rank must see it
        found = {
            "kills": kills(Path(folder), options.kills, options.seed),
            "refusals": refusals(Path(folder)),
        }
    print(json.dumps(found))
    if options.out is not None:
        run = {"ranks": RANKS, "steps": STEPS, "every": EVERY}
        save("faults", {"settings": run, **found}, options.out)
    good = found["kills"]["other"] == 0 and all(r["sound"] for r in found["refusals"].values())
    return 0 if good else 1


def kills(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kill one rank or all at random moments, and go on from the last checkpoint, until the end.

    Args:
        folder: for runs.
        count: of kills.
        seed: of the moments.

    Returns:
        Kills of one rank and of all; runs that came to their end, and how many of them to another
        one than the unbroken run; how many kills left a half checkpoint; and the longest time that
        a rank outlived the other, in seconds.

    Raises:
        RuntimeError: if a rank hangs, or a run that nobody killed does not come to its end.
    """
    chosen = random.Random(seed)
    start = time.perf_counter()
    wanted = _to_the_end(folder / "unbroken")
    usual = time.perf_counter() - start
    found = {"one": 0, "all": 0, "runs": 0, "other": 0, "half": 0}
    longest = 0.0
    while found["one"] + found["all"] < count:
        run = folder / f"run {found['runs']}"
        while not (run / "final.pt").exists():
            ranks = _start(run)
            _wait(ranks, seconds=chosen.uniform(0.0, usual))
            if found["one"] + found["all"] < count and all(rank.is_alive() for rank in ranks):
                kind = chosen.choice(("one", "all"))
                found[kind] += 1
                for rank in ranks if kind == "all" else [chosen.choice(ranks)]:
                    if rank.pid is not None:
                        os.kill(rank.pid, signal.SIGKILL)
            else:
                _wait(ranks, seconds=2 * TIMEOUT.total_seconds())
                if not (run / "final.pt").exists():
                    raise RuntimeError("a run that nobody killed has not come to its end")
            killed = time.perf_counter()
            _wait(ranks, seconds=2 * TIMEOUT.total_seconds())
            longest = max(longest, time.perf_counter() - killed)
            if any(rank.is_alive() for rank in ranks):
                raise RuntimeError("a rank hangs although the other one is gone")
            found["half"] += bool(list(run.glob(".*.part")))
        state = torch.load(run / "final.pt", weights_only=True)
        same = all(torch.equal(value, wanted[key]) for key, value in state.items())
        found["runs"] += 1
        found["other"] += not (same and state.keys() == wanted.keys())
    return {**found, "longest_wait": round(longest, 1)}


def refusals(folder: Path) -> dict[str, dict[str, Any]]:
    """Save where the disk of one rank refuses; both must say so, and keep the older checkpoint."""
    ways: dict[str, Callable[[], None]] = {"full": _full}
    if os.geteuid() == 0:  # root may write anywhere: the rank becomes somebody else
        ways["read-only"] = _powerless
    found = {}
    for name, way in ways.items():
        run = folder / name
        ranks = _start(run, partial_of=way)
        _wait(ranks, seconds=2 * TIMEOUT.total_seconds())
        said = [json.loads((run / f"{rank}.json").read_text()) for rank in range(RANKS)]
        sound = all(each["error"] and each["older"] for each in said)
        found[name] = {"sound": sound and not (run / "second").exists(), "said": said[0]["error"]}
    return found


def _full() -> None:
    sys.dont_write_bytecode = True  # Python would keep half of a module, and fail at it later
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def _powerless() -> None:
    os.seteuid(NOBODY)


def _start(run: Path, partial_of: Callable[[], None] | None = None) -> list[BaseProcess]:
    """Start the ranks by forking: this process has imported everything, and computed nothing."""
    run.mkdir(exist_ok=True)
    os.chmod(run, 0o755)
    meet = Path(tempfile.mkdtemp(dir=run)) / "meet"
    os.chmod(meet.parent, 0o777)
    context = multiprocessing.get_context("fork")
    target, extra = (_train, ()) if partial_of is None else (_refused, (partial_of,))
    ranks: list[BaseProcess] = [
        context.Process(target=target, args=(rank, run, meet, *extra)) for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _wait(ranks: Sequence[BaseProcess], seconds: float) -> None:
    end = time.perf_counter() + seconds
    for rank in ranks:
        rank.join(max(0.0, end - time.perf_counter()))


def _to_the_end(run: Path) -> dict[str, Tensor]:
    _wait(_start(run), seconds=10 * TIMEOUT.total_seconds())
    found: dict[str, Tensor] = torch.load(run / "final.pt", weights_only=True)
    return found


# -- what a rank does -----------------------------------------------------------------------------


def _together(rank: int, meet: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sparse model of both ranks, EID on, and its optimizer."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=RANKS, timeout=TIMEOUT
    )
    torch.manual_seed(0)
    model = fully_connected(32, inputs=16)
    method = SpikeNM(eid=EID(every=3))
    spikenm_fx.sparsify(model, "2:4", rules=[Rule("re:.*")], method=method, total_steps=STEPS)
    parallel = nn.parallel.DistributedDataParallel(model)
    return parallel, torch.optim.Adam(parallel.parameters(), lr=0.01)


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _train(rank: int, run: Path, meet: Path) -> None:
    """Go on from the last checkpoint; the data of a step follow from its number."""
    model, optimizer = _together(rank, meet)
    done = max((int(path.name.split("-")[1]) for path in run.glob("step-*")), default=0)
    if done:
        state = _state_of(model, optimizer)
        load_distributed(state, run / f"step-{done}")
        set_state_dict(
            *(model, optimizer),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    for step in range(done, STEPS):
        generator = torch.Generator().manual_seed(step)
        x = 2 * torch.rand(4, BATCH, 16, generator=generator)
        optimizer.zero_grad()
        model.train()(x[:, rank::RANKS]).square().mean().backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            save_distributed(_state_of(model, optimizer), run / f"step-{step + 1}")
    if rank == 0:
        spikenm_fx.checkpoint.save_state(run / "final.pt", model.state_dict())
    dist.barrier()
    os._exit(0)


def _refused(rank: int, run: Path, meet: Path, way: Callable[[], None]) -> None:
    """Save; let the disk of the second rank refuse; save again, and load the first one."""
    model, optimizer = _together(rank, meet)
    before = _state_of(model, optimizer)
    save_distributed(before, run / "first")
    said = open(run / f"{rank}.json", "w", encoding="utf-8")  # noqa: SIM115  # while it may
    if rank == RANKS - 1:
        way()
    error = ""
    try:
        save_distributed(before, run / "second")
    except CheckpointError as refused:
        error = str(refused)
    older = False
    with contextlib.suppress(CheckpointError):
        load_distributed(_state_of(model, optimizer), run / "first")
        older = True
    with said:
        json.dump({"error": error[:1000], "older": older}, said)
    dist.barrier()
    said.close()
    os._exit(0)
