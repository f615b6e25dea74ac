# SPDX-License-Identifier: Apache-2.0
"""What masks and EID add to a training step, over the dense step of the same network."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from spikenm_fx.bench.measure import add_resuming, measured, positive
from spikenm_fx.bench.versions import Version, add_before, versions
from spikenm_fx.masks import EID, native

__all__ = ["main"]

NETWORKS = ("fc2048", "fc4096", "vgg-small")
CANDIDATES = (
    ("spikenm", "2:4"),
    ("spikenm", "1:8"),
    ("spikenm, no EID", "2:4"),
    ("srste", "2:4"),
    ("srste", "1:8"),
    ("maskllm", "2:4"),
)
_MEAN = "a run's mean"


def main(arguments: Sequence[str]) -> None:
    """Time single steps of dense and sparse networks in turn; write ``results/step.json``.

    A step of the mean run is nineteen ordinary ones and one that refreshes the credits, both
    measured.  With ``--before`` an earlier checkout takes turns, each version in a process of its
    own beside a dense network of its own.
    """
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench step", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", help="methods", default=None)
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=9)
    add_before(parser)
    add_resuming(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Version(folder, threads=options.threads))
            for name, folder in versions(options.before).items()
        }
        wanted = {
            f"{network}, {method} {nm}": lambda network=network, method=method, nm=nm: _row(
                running, network, method, nm, options
            )
            for network in options.networks
            for method, nm in CANDIDATES
            if options.only is None or method in options.only
        }
        sampler = "torch" if native.kernel_for(torch.zeros(1, 4, 1), 2) is None else "native"
        about = {
            "settings": {
                **{key: getattr(options, key) for key in ("batch", "threads", "repeats")},
                "steps": 4,
                "sampler": sampler,
                "refresh_every": EID().every,
                "versions": sorted(running),
            }
        }
        measured("step", wanted, about, _summary, options)


def _row(
    running: dict[str, Version], network: str, method: str, nm: str, options: Any
) -> dict[str, Any]:
    kinds: dict[str, str | None] = {"dense": None, "ordinary": method}
    if method == "spikenm":
        kinds["refreshing"] = f"{method}, refreshing"
    seconds: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in kinds} for name in running
    }
    for _ in range(options.repeats):
        for name, version in running.items():
            for kind, chosen in kinds.items():
                asked = {"network": network, "method": chosen, "nm": nm, "batch": options.batch}
                seconds[name][kind].append(version.ask("time", **asked)["seconds"])
    for version in running.values():
        version.ask("forget")
    row: dict[str, Any] = {"network": network, "method": method, "nm": nm}
    for name, found in seconds.items():
        ratios = {
            kind: statistics.median(a / b for a, b in zip(found[kind], found["dense"], strict=True))
            for kind in kinds
        }
        every = EID().every if "refreshing" in kinds else 1
        mean = ((every - 1) * ratios["ordinary"] + ratios.get("refreshing", 1.0)) / every
        row[name] = {
            "dense_milliseconds": 1e3 * statistics.median(found["dense"]),
            "over_dense": {**ratios, _MEAN: mean if every > 1 else ratios["ordinary"]},
        }
    shown = "   ".join(f"{name} {row[name]['over_dense'][_MEAN]:.2f}x" for name in running)
    print(f"{network:<10} {method + ' ' + nm:<24} {shown}", flush=True)
    return row


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        row["key"]: {
            name: row[name]["over_dense"][_MEAN] for name in ("before", "after") if name in row
        }
        for row in rows
    }
