# SPDX-License-Identifier: Apache-2.0
"""Packed layers against the best dense torch path: ratios, spikes and outputs as fp32 tensors."""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.bench.measure import add_resuming, interleaved, measured, positive
from spikenm_fx.native.library import Kernel, available_kernels
from spikenm_fx.pack import (
    LayerGeometry,
    PackedWeight,
    native_status,
    pack_weight,
    unpack_weight,
)
from spikenm_fx.pack.kernels.cpu import run_layer
from spikenm_fx.pack.kernels.layouts import Layout, layout_for, supports
from spikenm_fx.pack.kernels.reference import dense_layer
from spikenm_fx.pattern import NM, BlockView

__all__ = ["Shape", "conv", "linear", "main", "module_of", "pruned", "shapes"]

Timed = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer and the batch it is run on."""

    name: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    geometry: LayerGeometry


def linear(tokens: int, inputs: int, outputs: int) -> Shape:
    """A linear layer on a batch of tokens."""
    name = f"linear {tokens} x {inputs}->{outputs}"
    return Shape(name, (outputs, inputs), (tokens, inputs), LayerGeometry())


def conv(images: int, inputs: int, outputs: int, size: int, k: int, stride: int = 1) -> Shape:
    """A convolution of ``k`` by ``k`` on square images of ``size``."""
    geometry = LayerGeometry.conv(2, stride=stride, padding=k // 2)
    name = f"conv{k}x{k}/{stride} N={images} {inputs}->{outputs} @{size}x{size}"
    return Shape(name, (outputs, inputs, k, k), (images, inputs, size, size), geometry)


def shapes() -> Iterator[Shape]:
    """The layers of the comparison with dense torch."""
    for inputs, outputs in ((512, 512), (1024, 4096), (4096, 1024)):
        yield from (linear(tokens, inputs, outputs) for tokens in (64, 256, 512))
    for images in (4, 64):
        yield conv(images, 128, 128, 32, 3)
        yield conv(images, 256, 256, 16, 3)
        yield conv(images, 512, 512, 8, 3)
        yield conv(images, 256, 256, 16, 1)
        yield conv(images, 128, 256, 32, 3, stride=2)


def main(arguments: list[str]) -> None:
    """Time every shape, print a table, write ``results/layers-....json``, row by row."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench layers", description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.05, 0.10, 0.15])
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--int8", action="store_true", help="int8 weights, against oneDNN int8")
    parser.add_argument("--no-inductor", action="store_true", help="dense eager paths alone")
    add_resuming(parser)
    options = parser.parse_args(arguments)
    options.patterns = [str(NM.parse(pattern)) for pattern in options.patterns]  # or is refused
    torch.set_num_threads(options.threads)
    status = native_status()
    print(f"kernels: {status.levels[-1] if status.available else status.reason}")
    about = {
        "kernels": list(status.levels),
        "clock": "CPU time of the thread" if options.threads == 1 else "wall",
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", "all that the processor has"),
        "repeats": options.repeats,
        "patterns": options.patterns,
        "inductor": not options.no_inductor,
    }
    wanted = {
        f"{shape.name} {rate:.0%}": partial(_printed_row, shape, rate, options)
        for shape in shapes()
        if options.only in shape.name
        for rate in options.rates
    }
    name = f"layers{'-int8' if options.int8 else ''}-{options.threads}t"
    rows = measured(name, wanted, about, _summary, options)
    for line, values in _summary(rows).items():
        print(f"{line:<28} median {values['median']:.2f}x  least {values['least']:.2f}x")


def _printed_row(shape: Shape, rate: float, options: Any) -> dict[str, Any]:
    torch.compiler.reset()
    row = _row(shape, rate, options)
    ratios = "  ".join(f"{k} {v:.2f}" for k, v in row["ratios"].items())
    print(f"{shape.name:<40} {rate:4.0%} dense {row['dense_ms']:8.3f} ms  {ratios}", flush=True)
    return row


def _row(shape: Shape, rate: float, options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.weight, generator=generator) / shape.weight[1] ** 0.5
    x = (torch.rand(shape.x, generator=generator) < rate).float()
    timed = _dense(shape, weight, x, inductor=not options.no_inductor)
    dense = list(timed)
    if options.int8:
        timed |= _onednn_int8(shape, weight, x)
    sizes = {"dense": {"file": weight.numel() * 4, "resident": weight.numel() * 4}}
    for pattern in options.patterns:
        packed = pruned(shape, weight, NM.parse(pattern), int8=options.int8)
        layouts = _layouts(packed)
        timed |= _packed(shape, x, packed, layouts)
        if shape.geometry.kind == "linear" and not options.int8:
            timed |= _csr(pattern, x, unpack_weight(packed))
        sizes[pattern] = {"file": packed.nbytes} | {k: v.nbytes for k, v in layouts.items()}
    with torch.inference_mode():
        # One thread: CPU time, so that other work on the machine does not count.
        clock = time.thread_time if options.threads == 1 else time.perf_counter
        seconds = interleaved(timed, repeats=options.repeats, warmup=2, clock=clock)
    best = min(seconds[name] for name in dense)
    ratios = {name: best / s for name, s in seconds.items() if name not in dense}
    for pattern in options.patterns:
        own = [r for n, r in ratios.items() if n.startswith(pattern) and not n.endswith("csr")]
        ratios[f"auto {pattern}"] = max(own, default=0.0)  # under 1: the choice is dense
    return {
        "shape": shape.name,
        "rate": rate,
        "dense": min(dense, key=lambda name: seconds[name]),
        "dense_ms": best * 1e3,
        "ms": {name: s * 1e3 for name, s in seconds.items()},
        "ratios": ratios,
        "bytes": sizes,
    }


def _dense(shape: Shape, weight: Tensor, x: Tensor, *, inductor: bool) -> Timed:
    timed: Timed = {"dense": partial(dense_layer, x, weight, None, shape.geometry)}
    if x.dim() == 4:
        last = torch.channels_last
        x_last, w_last = x.to(memory_format=last), weight.to(memory_format=last)
        timed["dense channels_last"] = partial(dense_layer, x_last, w_last, None, shape.geometry)
    if inductor:
        module = module_of(shape, weight).eval()
        compiled = torch.compile(module, options={"freezing": True}, dynamic=False)
        with torch.no_grad():
            compiled(x)
        timed["dense inductor"] = lambda: _no_grad(compiled, x)
    return timed


def _csr(pattern: str, x: Tensor, weight: Tensor) -> Timed:
    """What plain CSR makes of the same weight: of scipy, and of torch."""
    import scipy.sparse

    with_scipy, with_torch = scipy.sparse.csr_array(weight.numpy()), weight.to_sparse_csr()
    columns = x.t().contiguous()  # as both multiply; turning them is not counted
    return {
        f"{pattern} scipy csr": partial(with_scipy.__matmul__, columns.numpy()),
        f"{pattern} torch csr": partial(torch.matmul, with_torch, columns),
    }


def _no_grad(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x)
    return y


def module_of(shape: Shape, weight: Tensor) -> nn.Module:
    """Torch's layer of this shape on a dense weight."""
    module: nn.Linear | nn.Conv2d
    if shape.geometry.kind == "linear":
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        stride, padding = shape.geometry.stride, shape.geometry.padding
        module = nn.Conv2d(
            weight.shape[1], weight.shape[0], weight.shape[2], stride[0], padding[0], bias=False
        )
    module.weight.data = weight
    return module


def _onednn_int8(shape: Shape, weight: Tensor, x: Tensor) -> Timed:
    """OneDNN's int8 layer, inputs already quantised and outputs left so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "onednn"
        scales = weight.abs().flatten(1).amax(1) / 127
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        xq = torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)
        module: Any
        if shape.geometry.kind == "linear":
            module = torch.ao.nn.quantized.Linear(weight.shape[1], weight.shape[0])
        else:
            stride, padding = shape.geometry.stride, shape.geometry.padding
            module = torch.ao.nn.quantized.Conv2d(
                weight.shape[1], weight.shape[0], weight.shape[2], stride[0], padding[0]
            )
            xq = xq.contiguous(memory_format=torch.channels_last)
        module.set_weight_bias(quantised, None)
        module.scale, module.zero_point = 0.1, 64
    return {"onednn int8": partial(module, xq)}


def pruned(shape: Shape, weight: Tensor, nm: NM, *, int8: bool) -> PackedWeight:
    """The largest magnitudes of every block of ``weight [*shape.weight]``, packed."""
    view = BlockView(nm, tuple(weight.shape))
    blocks = view.to_blocks(weight)
    kept = torch.zeros_like(blocks).scatter_(1, blocks.abs().topk(nm.keep, dim=1).indices, 1.0)
    dtype = torch.int8 if int8 else None
    return pack_weight(view.from_blocks(blocks * kept), nm, geometry=shape.geometry, dtype=dtype)


def _layouts(packed: PackedWeight) -> dict[Kernel, Layout]:
    return {
        kernel: layout_for(kernel, packed)
        for kernel in available_kernels()
        if supports(kernel, packed)
    }


def _packed(shape: Shape, x: Tensor, packed: PackedWeight, layouts: dict[Kernel, Layout]) -> Timed:
    # The memory format is the caller's choice: each kernel is shown the one that suits it.
    inputs = {"": x}
    if x.dim() == 4:
        inputs[" channels_last"] = x.to(memory_format=torch.channels_last)
    return {
        f"{packed.nm} {kernel}{suffix}": partial(
            run_layer, given, layout, packed.shape, shape.geometry
        )
        for kernel, layout in layouts.items()
        for suffix, given in inputs.items()
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    gathered: dict[str, list[float]] = {}
    for row in rows:
        for name, ratio in row["ratios"].items():
            if name.startswith(("auto", "onednn")) or name.endswith("csr"):
                gathered.setdefault(f"{name} at {row['rate']:.0%}", []).append(ratio)
        if "onednn int8" in row["ratios"]:
            for name, ratio in row["ratios"].items():
                if name.startswith("auto"):
                    against = ratio / row["ratios"]["onednn int8"]
                    key = f"{name} at {row['rate']:.0%} / onednn"
                    gathered.setdefault(key, []).append(against)
    return {key: {"median": statistics.median(v), "least": min(v)} for key, v in gathered.items()}
