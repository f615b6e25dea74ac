# SPDX-License-Identifier: Apache-2.0
"""What masks add to training besides time: memory, launches, host syncs, graphs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from spikenm_fx.bench.measure import add_resuming, measured, positive
from spikenm_fx.bench.versions import Version, add_before, versions
from spikenm_fx.bench.worker import DEPTH

__all__ = ["main"]

MEMORY = ("dense", "spikenm", "spikenm, no EID", "srste")
PATTERNS = ("2:4", "1:8")
GRAPH_STEPS = 100


def main(arguments: Sequence[str]) -> None:
    """Measure all of it, write ``results/footprint.json``.

    Memory is what is alive after a step with Adam, gradients included, in units of the weights;
    how it grows with the batch is what is kept of activations.  Launches are ATen operations that
    would start a kernel on a device, counted without the compiled kernels, beyond those of the
    dense network with 54 layers.  Graphs are those of ``torch.compile``.
    """
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench footprint", description=__doc__)
    parser.add_argument("--width", type=positive, default=1024)
    parser.add_argument("--threads", type=positive, default=2)
    add_before(parser)
    add_resuming(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        empty = stack.enter_context(tempfile.TemporaryDirectory())
        without_kernels = {"SPIKENM_FX_BUILD": "0", "SPIKENM_FX_CACHE": empty}
        running: dict[str, dict[str, Version]] = {"native": {}, "torch": {}}
        for name, folder in versions(options.before).items():
            for path, environment in (("native", None), ("torch", without_kernels)):
                version = Version(folder, threads=options.threads, environment=environment)
                running[path][name] = stack.enter_context(version)
        wanted: dict[str, Callable[[], dict[str, Any]]] = {
            f"memory, {method} 2:4": partial(_memory, running["native"], method, options.width)
            for method in MEMORY
        }
        wanted |= {
            f"launches, spikenm {nm}": partial(_launches, running["torch"], nm) for nm in PATTERNS
        }
        wanted |= {f"graphs, {nm}": partial(_graphs, running["native"], nm) for nm in PATTERNS}
        settings = {"width": options.width, "threads": options.threads, "layers": DEPTH}
        about = {"settings": {**settings, "versions": sorted(running["native"])}}
        rows = measured("footprint", wanted, about, lambda rows: {"rows": len(rows)}, options)
    for row in rows:
        print(f"{row['key']:<32}", {k: v for k, v in row.items() if k != "key"})


def _memory(running: dict[str, Version], method: str, width: int) -> dict[str, Any]:
    chosen = None if method == "dense" else method
    found: dict[str, Any] = {}
    for name, version in running.items():
        small, large = (
            version.ask("memory", network=f"fc{width}", method=chosen, nm="2:4", batch=batch)
            for batch in (32, 96)
        )
        inputs = 64 * 784 * 4 + 64 * 8  # the larger batch itself: images, labels
        kept = large["alive"][-1] - small["alive"][-1] - inputs
        found[name] = {
            "weights": small["over_weights"],
            "activations_kept_bytes": max(kept, 0),
        }
    return found


def _launches(running: dict[str, Version], nm: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, version in running.items():
        counted = version.ask("count", method="spikenm", nm=nm)
        sparse, dense = counted["sparse"], counted["dense"]
        extra = {kind: sparse[kind]["launches"] - dense[kind]["launches"] for kind in sparse}
        syncs = {kind: sparse[kind]["syncs"] - dense[kind]["syncs"] for kind in sparse}
        found[name] = {"launches": extra, "syncs": syncs}
    return found


def _graphs(running: dict[str, Version], nm: str) -> dict[str, Any]:
    return {name: v.ask("graphs", nm=nm, steps=GRAPH_STEPS) for name, v in running.items()}
