# SPDX-License-Identifier: Apache-2.0
"""Masks on a CUDA device: step time, launches, host syncs, the CPU's own bits; 2:4 products."""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.bench.measure import RESULTS, positive, save
from spikenm_fx.bench.worker import launches, stepper
from spikenm_fx.export import semi_report, semi_structured
from spikenm_fx.masks.noise import gumbel, noise_key
from spikenm_fx.table import text_table

__all__ = ["main", "measure"]

NETWORKS = ("fc2048", "fc4096", "deep")
PATTERNS = ("2:4", "1:8")
PRODUCTS = ((1024, 1024, 4096), (4096, 4096, 4096), (4096, 1024, 16384), (512, 4608, 65536))
"""Outputs, inputs and rows (time, batch and pixels merged) of 2:4 products."""
NOT_MEASURED = "not measured: no CUDA device"


def main(arguments: Sequence[str]) -> None:
    """Measure what there is to measure; write ``results/gpu.json``.

    Without a device it says so, and records that beside the machine, in place of figures.
    """
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(NOT_MEASURED)
        print(save("gpu", {"status": NOT_MEASURED}, options.out))
        return
    found = measure(options.device, options.networks, batch=options.batch, repeats=options.repeats)
    print("\n".join(text_table(_table(found["semi_structured"]))))
    print(json.dumps(found, indent=1))
    print(save("gpu", {"status": "measured", **found}, options.out))


def measure(
    device: str, networks: Sequence[str] = NETWORKS, *, batch: int = 32, repeats: int = 20
) -> dict[str, Any]:
    """All figures of one device.

    Args:
        device: ``"cuda"``; ``"cpu"`` to try the script where there is no other.
        networks: see :func:`~spikenm_fx.bench.worker.stepper`.
        batch: inputs of a step.
        repeats: timed steps of each network.
    """
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "settings": {"batch": batch, "repeats": repeats},
        "agreement": {nm: _agreement(device, nm) for nm in PATTERNS},
        "steps": {
            f"{network}, {nm}": _step(device, network, nm, batch, repeats)
            for network in networks
            for nm in PATTERNS
        },
        "launches": {nm: _launches(device, nm) for nm in PATTERNS},
        "semi_structured": [_products(device, *shape) for shape in PRODUCTS],
    }


def _products(device: str, outputs: int, inputs: int, rows: int) -> dict[str, Any]:
    """One 2:4 Linear of spikes on sparse tensor cores and dense, by export.semi_structured."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs, outputs))
    spikenm_fx.sparsify(net, "2:4", method="magnitude", rules=[Rule("re:.*")])
    spikenm_fx.fold(net)
    spikes = (torch.rand(rows, inputs) < 0.15).float()
    found: dict[str, Any] = {"weight": [outputs, inputs], "rows": rows}
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        made = semi_structured(net.to(device), spikes.to(device), dtype=dtype)
        (row,) = semi_report(made).rows
        with torch.no_grad():
            wanted = net.to("cpu")(spikes)
            seen = made(spikes.to(device)).cpu()
        difference = (seen - wanted).abs().max() / wanted.abs().max()
        found[str(dtype).removeprefix("torch.")] = {
            "dense_ms": row.dense_ms,
            "sparse_ms": row.sparse_ms,
            "runs": "sparse" if row.sparse else row.why,
            "difference_to_cpu_float32": float(difference),
        }
    return found


def _table(products: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("weight", "rows", "dtype", "dense ms", "sparse ms", "runs", "difference")
    ]
    for entry in products:
        for dtype in ("float16", "bfloat16", "int8"):
            seen = entry[dtype]
            times = [seen["dense_ms"], seen["sparse_ms"]]
            rows.append(
                (
                    "x".join(map(str, entry["weight"])),
                    str(entry["rows"]),
                    dtype,
                    *("not measured" if t is None else f"{t:.3f}" for t in times),
                    seen["runs"],
                    f"{seen['difference_to_cpu_float32']:.2g}",
                )
            )
    return rows


def _agreement(device: str, nm: str) -> dict[str, Any]:
    """Whether the device draws the CPU's noise, and how far masks of the same run agree."""
    zeros = torch.zeros(4096, 8, 3)
    noise = [gumbel(z, noise_key(3, 5, "layer")).cpu() for z in (zeros, zeros.to(device))]
    models = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
        spikenm_fx.sparsify(net, nm, rules=[Rule("re:.*")])
        models.append(net.to(where))
    same = []
    for number in range(5):
        masks = [_masks(model) for model in models]
        same.append(sum(int((a == b).sum()) for a, b in zip(*masks, strict=True)))
        for model in models:
            _learn(model, number)
    total = sum(mask.numel() for mask in _masks(models[0]))
    final = [_masks(model.eval()) for model in models]
    agree = sum(int((a == b).sum()) for a, b in zip(*final, strict=True))
    return {
        "noise_largest_difference": float((noise[0] - noise[1]).abs().max()),
        "noise_equal": float((noise[0] == noise[1]).float().mean()),
        "masks_by_step": [count / total for count in same],
        "final_masks": agree / total,
    }


def _masks(model: nn.Module) -> list[Tensor]:
    return [(m.weight != 0).cpu() for m in model.modules() if isinstance(m, nn.Linear)]


def _learn(model: nn.Module, seed: int) -> None:
    where = next(model.parameters()).device
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).to(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _step(device: str, network: str, nm: str, batch: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of a step by the device's own clock, dense and sparse in turn."""
    steps = {
        kind: stepper(network, method, nm, batch=batch, everywhere=True, device=device)[3]
        for kind, method in {
            "dense": None,
            "spikenm": "spikenm",
            "refreshing": "spikenm, refreshing",
            "srste": "srste",
        }.items()
    }
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(repeats):
        for kind, step in steps.items():
            seconds[kind].append(_seconds(device, step))
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "milliseconds": {kind: 1e3 * value for kind, value in median.items()},
        "over_dense": {kind: value / median["dense"] for kind, value in median.items()},
    }


def _seconds(device: str, run: Callable[[], None]) -> float:
    import time

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _launches(device: str, nm: str) -> dict[str, Any]:
    """Launches beyond the dense network's, and syncs by torch's own warnings."""
    counted: dict[str, dict[str, int]] = {}
    for name, method in (("sparse", "spikenm"), ("dense", None)):
        model, optimizer, passes, step = stepper(
            "deep", method, nm, batch=2, optimizer="SGD", everywhere=True, device=device
        )
        for _ in range(2):
            step()
        forward = launches(passes)
        last = launches(optimizer.step)
        counted[name] = {
            "passes": sum(forward.kernels.values()),
            "step": sum(last.kernels.values()),
            "kernels": _kernels(device, step),
            "syncs": _syncs(device, step),
        }
        del model
    return {
        "layers": 54,
        **counted,
        "extra": {
            kind: counted["sparse"][kind] - counted["dense"][kind] for kind in counted["dense"]
        },
    }


def _kernels(device: str, run: Callable[[], None]) -> int:
    """Kernels that the device runs, by the profiler; ATen operations elsewhere."""
    from torch.profiler import ProfilerActivity, profile

    if not device.startswith("cuda"):
        return sum(launches(run).kernels.values())
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    return sum(1 for event in profiler.events() if event.device_type.name == "CUDA")


def _syncs(device: str, run: Callable[[], None]) -> int:
    """How often ``run`` waits for the device."""
    if not device.startswith("cuda"):
        return sum(launches(run).syncs.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
