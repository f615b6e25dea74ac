# SPDX-License-Identifier: Apache-2.0
"""Whole spiking networks: packed engine against eager and compiled dense torch, T=4."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.bench.measure import add_resuming, interleaved, measured, positive
from spikenm_fx.bench.profile import where_time_goes
from spikenm_fx.bench.subjects import (
    NETWORKS,
    Network,
    calibrate_rates,
    prune,
    spikes_from_rest,
)
from spikenm_fx.pack import PackReport, native_status, pack, packing
from spikenm_fx.pack.check.agreement import agreement as layer_by_layer
from spikenm_fx.pattern import NM
from spikenm_fx.program import Engine

__all__ = ["agreement", "classes_of", "compiled_copy", "from_rest", "main"]


def main(arguments: list[str]) -> None:
    """Time every network and write ``results/network-Nt.json``, row by row."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench network", description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--rate", type=float, default=0.1, help="firing rate to calibrate to")
    parser.add_argument("--only", nargs="+", default=list(NETWORKS))
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--int8", action="store_true", help="int8 weights as well")
    add_resuming(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"kernels: {native_status().levels or native_status().reason}")
    one = options.threads == 1
    about = {
        "clock": "CPU time of the thread, median" if one else "wall, least of the repeats",
        "repeats": options.repeats,
        "int8": options.int8,
        "compiled": not options.no_compile,
    }
    wanted = {
        f"{name} {pattern} batch {batch} rate {options.rate:.0%}": partial(
            _row, name, NM.parse(pattern), batch, options
        )
        for name, pattern, batch in itertools.product(
            options.only, options.patterns, options.batches
        )
    }
    rows = measured(f"network-{options.threads}t", wanted, about, _summary, options)
    print("  ".join(f"{key} {value:.2f}x" for key, value in _summary(rows).items() if value))


def _summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Geometric means, over all rows and over those of each pattern and batch."""
    ratios = ("over_eager", "over_compiled", "int8_over_eager", "int8_over_compiled")
    summary = {key: _geometric([r[key] for r in rows if r.get(key)]) for key in ratios}
    for pattern, batch in sorted({(row["pattern"], row["batch"]) for row in rows}):
        some = [r for r in rows if (r["pattern"], r["batch"]) == (pattern, batch)]
        for key in ratios:
            name = f"{key} {pattern} batch {batch}"
            summary[name] = _geometric([r[key] for r in some if r.get(key)])
    return summary


def _row(name: str, nm: NM, batch: int, options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    prune(network.model, nm)
    x = network.inputs(batch)
    rates = calibrate_rates(network, network.inputs(4), options.rate)
    engine = pack(network.model, x)
    candidates = {"eager": network.model, "packed": engine}
    if options.int8:
        candidates["packed int8"] = pack(network.model, x, dtype=torch.int8)
    if not options.no_compile:
        candidates["compiled"] = compiled_copy(network, x)
    row = {
        "network": name,
        "pattern": str(nm),
        "batch": batch,
        "rate": options.rate,
        "threads": options.threads,
        "rates": rates,
        **agreement(network, engine, x),
        "channels_last_mismatch": _channels_last_mismatch(network, x),
    }
    with torch.no_grad():
        calls = {key: from_rest(network, model, x) for key, model in candidates.items()}
        seconds = interleaved(
            calls,
            repeats=options.repeats,
            clock=time.thread_time if options.threads == 1 else time.perf_counter,
            statistic=statistics.median if options.threads == 1 else min,
        )
        row["profile"] = where_time_goes(calls["packed"])
    row["ms"] = {key: value * 1e3 for key, value in seconds.items()}
    for key, prefix in (("packed", ""), ("packed int8", "int8_")):
        for baseline in ("eager", "compiled"):
            if key in seconds and baseline in seconds:
                row[f"{prefix}over_{baseline}"] = seconds[baseline] / seconds[key]
    row |= _about(packing(engine))
    _print(row)
    return row


def _about(report: PackReport) -> dict[str, Any]:
    layers = report.layers
    return {
        "choices": report.choices,
        "layer_rates": {layer.name: layer.rate for layer in layers},
        "layer_gains": {layer.name: layer.gain for layer in layers},
        "planes": {layer.name: layer.planes for layer in layers},
        "fused": sum(bool(layer.neuron) for layer in layers),
        "bytes": {
            "dense": sum(layer.dense_bytes for layer in layers),
            "packed": sum(layer.packed_bytes for layer in layers),
            "resident": sum(layer.resident_bytes for layer in layers),
        },
    }


def _print(row: dict[str, Any]) -> None:
    kinds = list(row["choices"].values())
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    times = "  ".join(f"{key} {value:.1f}" for key, value in row["ms"].items())
    ratios = "  ".join(f"{key} {row[key]:.2f}x" for key in row if "over_" in key)
    print(
        f"{row['network']:<16} {row['pattern']:>4} batch {row['batch']:<3} "
        f"rate {row['rates']['mean']:.0%}  ms: {times}  {ratios}  ({counts}; {row['fused']} fused) "
        f"other spikes {row['spike_mismatch']:.1e}, {row['first_mismatch']:.1e} at first, "
        f"{row['layer_mismatch']:.1e} layer by layer; "
        f"torch in channels_last {row['channels_last_mismatch']:.1e}; "
        f"to float64 {row['spike_mismatch_to_float64']:.1e}, eager "
        f"{row['eager_mismatch_to_float64']:.1e}; same answers {row['same_predictions']:.0%}",
        flush=True,
    )


def from_rest(network: Network, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward of the network, or of what was made of it, that forgets its state first.

    Args:
        network: with its reset.
        model: eager, compiled or an engine.
        x: its input, of the shape that the network takes.
    """
    # A compiled module wraps the one that holds the state.
    target = getattr(model, "_orig_mod", model)

    def call() -> Tensor:
        if isinstance(target, Engine):
            target.reset()
        else:
            network.reset(target)
        found: Tensor = model(x)
        return found

    return call


def compiled_copy(network: Network, x: Tensor) -> nn.Module:
    """A copy of the network's model behind ``torch.compile``, compiled for an input.

    Args:
        network: model and reset.
        x: the input, of the shape that it takes.
    """
    module = copy.deepcopy(network.model)
    network.reset(module)
    compiled: Any = torch.compile(module, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            network.reset(module)
            compiled(x)
    return compiled  # type: ignore[no-any-return]


def agreement(network: Network, engine: nn.Module, x: Tensor) -> dict[str, float]:
    """Share of other spikes than the eager model's, and of equal predictions.

    A membrane that lies on its threshold but for rounding fires or not by the order of a sum, and
    networks amplify that.  Three figures tell it from an error: ``first_mismatch``, the share in
    the first neuron that differs, whose inputs were still the same; ``layer_mismatch``, the largest
    share in any neuron on the eager model's spikes; and how far eager fp32 is from float64.

    Args:
        network: model and reset.
        engine: made of it by ``pack``.
        x: an input of the network's own shape.
    """
    found = layer_by_layer(network.model, engine, lambda module: module(x), network.reset)
    expected, wanted = spikes_from_rest(network, network.model, x)
    output, spikes = spikes_from_rest(network, engine, x)
    true, exact = spikes_from_rest(network, copy.deepcopy(network.model).double(), x.double())
    return {
        "spike_mismatch": _mismatch(spikes, wanted),
        "first_mismatch": found.first.share if found.first is not None else 0.0,
        "layer_mismatch": max(neuron.share for neuron in found.neurons),
        "spike_mismatch_to_float64": _mismatch(spikes, exact),
        "eager_mismatch_to_float64": _mismatch(wanted, exact),
        "same_predictions": float((classes_of(output) == classes_of(expected)).float().mean()),
        "predictions_of_float64": float((classes_of(output) == classes_of(true)).float().mean()),
        "eager_predictions_of_float64": float(
            (classes_of(expected) == classes_of(true)).float().mean()
        ),
        "largest_difference": float((output - expected).abs().max()),
    }


def _channels_last_mismatch(network: Network, x: Tensor) -> float:
    """Share of other spikes of eager torch itself in another memory format: how hard ties weigh."""
    other: Any = copy.deepcopy(network.model)
    other.to(memory_format=torch.channels_last)
    _, wanted = spikes_from_rest(network, network.model, x)
    _, spikes = spikes_from_rest(network, other, x)
    return _mismatch(spikes, wanted)


def _mismatch(spikes: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    wrong = sum(int((spikes[name] != others[name]).sum()) for name in others)
    return wrong / sum(value.numel() for value in others.values())


def classes_of(output: Tensor) -> Tensor:
    """The class of each sample, of an output over steps or of their mean.

    Args:
        output: ``([T], samples, classes)``.
    """
    return (output.mean(0) if output.dim() > 2 else output).argmax(-1)


def _geometric(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
