# SPDX-License-Identifier: Apache-2.0
"""Where the time of a packed network goes, by kind of work."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

import torch.nn.functional as F

__all__ = ["KINDS", "where_time_goes"]

LINEAR = f"{F.linear.__module__}.{F.linear.__name__}"
"""A built-in function of a module that torch names privately."""

KINDS: dict[str, tuple[str, ...]] = {
    "spike kernels, neuron included": ("run_spikes",),
    "neurons alone": ("run_integrate",),
    "dense layers": ("torch.conv2d", "torch.conv1d", LINEAR),
    "floats to bits and back": ("pack_spikes", "_unpack"),
    "sums and pools of bits": ("_add", "_window", "avg_pool", "max_pool", "bitwise_or_", "plus"),
    "pools of floats": ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean"),
    "norms": ("batch_norm",),
    "attention": ("attention.py",),
    "copies": ("contiguous", "reshape", "torch.cat", "clone", "copy_"),
    "is the input constant?": ("torch.equal",),
}
"""Kinds of work, and what their functions are called (a whole name, or a file's)."""

REST = "Python and small operations"


def where_time_goes(call: Callable[[], object], *, runs: int = 3) -> dict[str, float]:
    """Share of each kind of work in the time of ``call``, largest first.

    The profiler's own cost counts as Python, which looks larger than it is.
    """
    call()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(runs):
        call()
    profiler.disable()
    seconds: dict[str, float] = {}
    entries: dict[tuple[str, int, str], tuple[float, ...]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for (file, _, function), timing in entries.items():
        kind = _kind(file, function)
        seconds[kind] = seconds.get(kind, 0.0) + timing[2]
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {kind: value / total for kind, value in ordered}


def _kind(file: str, function: str) -> str:
    # Built-in functions appear as "<built-in method torch.conv2d>" or "<method 'copy_' of ...>".
    words = function.strip("<>").replace("'", "").split()
    name = next((w for w in words if w not in ("built-in", "method")), function)
    for kind, names in KINDS.items():
        if name in names or file.rpartition("/")[2] in names:
            return kind
    return REST
