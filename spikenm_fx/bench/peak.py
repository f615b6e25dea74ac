# SPDX-License-Identifier: Apache-2.0
"""Peak memory of every verb on one large layer, and memory of a long run, which must stay flat."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx._torch import DispatchMode, tree_leaves
from spikenm_fx.bench.measure import RESULTS, positive, save
from spikenm_fx.bench.worker import fully_connected, living
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

__all__ = ["Counted", "flat", "main", "verbs"]

VERBS = ("sparsify", "train", "evaluate", "fold", "verify", "pack")
BATCH = 32


def main(arguments: Sequence[str]) -> None:
    """Memory of each verb in a fresh process, in units of the fp32 weight; a long run.

    Resident memory, as the system counts it, and all tensors.  Writes ``results/peak.json``.
    """
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench peak", description=__doc__)
    parser.add_argument("--width", type=positive, default=8192)
    parser.add_argument("--counted", type=positive, default=4096, help="width for the tensors")
    parser.add_argument("--steps", type=positive, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--here", choices=list(WAYS), help="measure verbs in this process, only")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.here:
        warnings.simplefilter("ignore")
        for _, _, run in verbs(64):
            run()  # what is loaded at the first use is no memory of a verb
        print(json.dumps(WAYS[options.here](options.width)))
        return
    widths = {"resident": options.width, "counted": options.counted}
    found: dict[str, Any] = {way: _apart(way, width) for way, width in widths.items()}
    found["alive"] = flat((options.steps // 4, options.steps))
    save("peak", {"settings": {**widths, "steps": options.steps}, **found}, options.out)
    print(json.dumps(found))


def _apart(way: str, width: int) -> dict[str, float]:
    """What a process of its own finds."""
    command = [sys.executable, "-m", "spikenm_fx.bench", "peak", "--here", way]
    ran = subprocess.run(
        [*command, "--width", str(width)], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def verbs(width: int) -> Iterable[tuple[str, nn.Module, Callable[[], object]]]:
    """Each verb in turn on one square linear layer: its name, the model, and what runs it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    x = (torch.rand(BATCH, width) < 0.1).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()

    def evaluate() -> None:
        with torch.no_grad():
            model.eval()(x)

    yield "sparsify", model, lambda: spikenm_fx.sparsify(model, "2:4", rules=[Rule("0")])
    yield "train", model, train
    optimizer.zero_grad()
    yield "evaluate", model, evaluate
    yield "fold", model, lambda: spikenm_fx.fold(model)
    yield "verify", model, lambda: spikenm_fx.verify(model, {"0": "2:4"})
    yield "pack", model, lambda: spikenm_fx.pack(model, x)


def resident(width: int) -> dict[str, float]:
    """Peak of the resident memory of each verb over its start, in units of the weight.

    Args:
        width: of the layer.
    """
    found = {}
    for name, _, run in verbs(width):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        kept = run()
        found[name] = round((_status("VmHWM") - before) / (4 * width**2), 3)
        del kept
    return found


def counted(width: int) -> dict[str, float]:
    """Peak of the bytes of all tensors that each verb makes, in units of the weight.

    Args:
        width: of the layer.
    """
    found = {}
    for name, model, run in verbs(width):
        with Counted([*model.parameters(), *model.buffers()]) as bytes_of:
            kept = run()
        found[name] = round(bytes_of.peak / (4 * width**2), 3)
        del kept
    return found


WAYS: dict[str, Callable[[int], dict[str, float]]] = {"resident": resident, "counted": counted}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


class Counted(DispatchMode):
    """Counts bytes of all tensors that are made inside, of torch's memory and of NumPy's.

    What an operation allocates for itself is not seen.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known = {_address(tensor) for tensor in besides}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0

    def __enter__(self) -> Counted:
        """Start, with NumPy's memory, too."""
        tracemalloc.start()
        super().__enter__()
        return self

    def __exit__(self, *about: Any) -> None:
        """Stop."""
        super().__exit__(*about)  # type: ignore[no-untyped-call]
        tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, then count."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in _tensors(*args, *kwargs.values(), out):
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                # of NumPy's memory tracemalloc knows
                if storage.resizable() and storage.data_ptr() not in self._known:
                    self._bytes -= self._alive.get(storage.data_ptr(), (None, 0))[1]
                    held = StorageWeakRef(storage), storage.nbytes()
                    self._alive[storage.data_ptr()] = held
                    self._bytes += held[1]
        by_numpy = tracemalloc.get_traced_memory()[1]
        if self._bytes + by_numpy > self.peak:  # if not with those that are gone, not without them
            self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
            self._bytes = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._bytes + by_numpy)
        tracemalloc.reset_peak()
        return out


def _tensors(*values: Any) -> Iterator[Tensor]:
    """Those among arguments of an operation, of which most are plain."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def flat(at: Sequence[int]) -> dict[str, dict[str, int]]:
    """Bytes and storages alive after some steps of one run, EID on.

    Args:
        at: numbers of steps, rising.
    """
    torch.manual_seed(0)
    model = fully_connected(48, inputs=24)
    method = SpikeNM(eid=EID(every=5))
    spikenm_fx.sparsify(model, "2:4", rules=[Rule("re:.*")], method=method, total_steps=2 * at[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step = partial(_step, model.train(), optimizer)
    found = {}
    for first, end in pairwise((0, *at)):
        for number in range(first, end):
            step(2 * torch.rand(4, 8, 24), number)
        optimizer.zero_grad()
        alive = living()
        found[str(end)] = {"bytes": sum(alive.values()), "storages": len(alive)}
    return found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, number: int) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    if number % 50 == 49:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()(x)
        model.train()
