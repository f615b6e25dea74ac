# SPDX-License-Identifier: Apache-2.0
"""Measured time of one forward, per layer and in all, for several variants of a model.

Variants take turns, so that a busy machine slows all of them alike; medians are reported.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from spikenm_fx.report.data import LatencyReport
from spikenm_fx.state import preserved_in_eval

__all__ = ["measure_latency"]


def measure_latency(
    variants: Mapping[str, nn.Module],
    batch: Any,
    forward: Callable[[nn.Module, Any], Any],
    reset: Callable[[nn.Module], Any],
    repeats: int,
) -> LatencyReport:
    """Median seconds of ``forward(model, batch)`` for each variant, and of each named layer.

    Args:
        variants: models by name; a layer is matched across them by its qualified name.
        batch: one batch that all of them take.
        forward: how a model runs it.
        reset: brings a model to rest before each forward.
        repeats: timed forwards each, after one to warm up.
    """
    totals: dict[str, list[float]] = defaultdict(list)
    layers: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = _common_names(variants)
    with contextlib.ExitStack() as stack:
        for model in variants.values():
            stack.enter_context(preserved_in_eval(model))
        for turn in range(repeats + 1):
            for label, model in variants.items():
                reset(model)
                spent: dict[str, float] = defaultdict(float)
                with _timed_layers(model, names, spent):
                    started = _now()
                    forward(model, batch)
                    took = _now() - started
                if turn:  # the first one warms caches and lazy kernels up
                    totals[label].append(took)
                    for name, seconds in spent.items():
                        layers[name][label].append(seconds)
    return LatencyReport(
        total={label: statistics.median(times) for label, times in totals.items()},
        layers={
            name: {label: statistics.median(times) for label, times in by_label.items()}
            for name, by_label in layers.items()
        },
        repeats=repeats,
        threads=torch.get_num_threads(),
    )


def _common_names(variants: Mapping[str, nn.Module]) -> frozenset[str]:
    """Weight layers, by the names that the variants share: a packed layer keeps its place."""
    from spikenm_fx.pattern import is_weight_layer

    names: set[str] = set()
    for model in variants.values():
        names |= {name for name, module in model.named_modules() if is_weight_layer(module)}
    return frozenset(names)


@contextlib.contextmanager
def _timed_layers(
    model: nn.Module, names: frozenset[str], spent: dict[str, float]
) -> Iterator[None]:
    started: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            started[name] = _now()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent[name] += _now() - started[name]

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name in names:
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
        yield


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
