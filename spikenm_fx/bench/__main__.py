# SPDX-License-Identifier: Apache-2.0
"""``python -m spikenm_fx.bench NAME ...`` runs the benchmark module of that name."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

import spikenm_fx.bench as bench
from spikenm_fx.errors import SpikeNMError

__all__ = ["bench_of", "benches", "main", "summary"]


def benches() -> dict[str, ModuleType]:
    """The modules that can be run, by name."""
    known = {name: bench_of(name) for name in sorted(_modules())}
    return {name: module for name, module in known.items() if module is not None}


def bench_of(name: str) -> ModuleType | None:
    """The module of one benchmark; the others, and what they need, are not imported."""
    if name not in _modules():
        return None
    module = importlib.import_module(f"{bench.__name__}.{name}")
    return module if hasattr(module, "main") else None


def _modules() -> set[str]:
    return {info.name for info in pkgutil.iter_modules(bench.__path__)} - {"__main__"}


def summary(module: ModuleType) -> str:
    """The first line of a benchmark's docstring."""
    return (module.__doc__ or "").strip().splitlines()[0]


def main(arguments: list[str]) -> int:
    """Run one benchmark, or list them.

    Exit status 2 for an unknown name, 3 for a file or pattern that cannot be used.
    """
    name, *rest = arguments or ["--help"]
    chosen = bench_of(name)
    if chosen is None:
        print("usage: python -m spikenm_fx.bench NAME [options]")
        for known_name, module in benches().items():
            print(f"  {known_name:<12}{summary(module)}")
        return 0 if name in ("-h", "--help") else 2
    try:
        return int(chosen.main(rest) or 0)
    except (OSError, SpikeNMError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
