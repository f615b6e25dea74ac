# SPDX-License-Identifier: Apache-2.0
"""Chapters on running packed weights: layers, what ``pack`` chooses, networks, their spikes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from spikenm_fx.bench.dispatch import small_shapes
from spikenm_fx.bench.profile import REST
from spikenm_fx.bench.tables.chapter import (
    Chapter,
    Result,
    markdown,
    percent,
    spread,
    times,
)

__all__ = ["CHAPTERS"]


def _threads(result: Result) -> str:
    count = int(result["machine"]["threads"])
    return f"{count} thread" + "s" * (count != 1)


def _layers(*results: Result) -> str:
    """Median and least ratio of the fastest packed kernel of each shape."""
    rows = [
        [key.removeprefix("auto "), _threads(result), times(group["median"]), times(group["least"])]
        for result in results
        for key, group in result["summary"].items()
    ]
    shapes = len({row["shape"] for row in results[0]["rows"]})
    return f"{shapes} linear and convolution shapes.\n\n" + markdown(
        ["weights, spikes", "threads", "median", "least"], rows
    )


def _dispatch(one: Result, two: Result, busy_one: Result, busy_two: Result) -> str:
    groups = one["summary"]
    rates = [key.split(" at ")[1] for key in groups if key.startswith("large layers, 2:4 at ")]
    rows = []
    for size in ("large", "small"):
        found = [groups[f"{size} layers, 2:4 at {rate}"] for rate in rates]
        rows.append([f"{found[0]['of']} {size} layers", *map(spread, found)])
        rows.append([f"{size}: dense chosen", *(f"{g['dense']} of {g['of']}" for g in found)])
    parts = [markdown(["2:4, median / least", *rates], rows), "Other weights and conditions:"]
    rows = [
        [key, words, g["of"], spread(g), g["dense"]]
        for words, result in (
            ("1 thread", one),
            ("2 threads", two),
            ("1 thread beside processes that keep both cores busy", busy_one),
            ("2 threads beside one busy process", busy_two),
        )
        for key, g in result["summary"].items()
        if result is not one or ", 2:4 " not in key
    ]
    head = ["layers", "where", "number", "median / least", "dense chosen"]
    return "\n\n".join([*parts, markdown(head, rows), "Small layers at 15 %:", _small(one)])


def _small(result: Result) -> str:
    """Where we lose: the calls that take microseconds."""
    small = {shape.name for shape in small_shapes()}
    cells = (
        [r["shape"], f"{1e3 * r['ms']['dense']:.0f} µs", r["choice"], times(r["over_dense"])]
        for r in result["rows"]
        if (r["pattern"], r["rate"]) == ("2:4", 0.15) and r["shape"] in small
    )
    return markdown(["layer", "torch's own", "chosen", "over torch"], cells)


def _networks(one: Result, two: Result) -> str:
    means = markdown(
        ["geometric means over all rows", *map(_threads, (one, two))],
        [
            [words, *(times(result["summary"][key]) for result in (one, two))]
            for words, key in (
                ("over eager", "over_eager"),
                ("over torch.compile", "over_compiled"),
                ("int8 over eager fp32", "int8_over_eager"),
                ("int8 over torch.compile fp32", "int8_over_compiled"),
            )
        ],
    )
    return "\n\n".join([means, *(_by_network(result) for result in (one, two)), _kinds(one, two)])


def _by_network(result: Result) -> str:
    head = ["over eager", "over torch.compile", "int8 over eager fp32"]
    keys = ("over_eager", "over_compiled", "int8_over_eager")
    rows = [
        [row["network"], row["pattern"], row["batch"], percent(row["rates"]["mean"])]
        + [times(row[key]) for key in keys]
        + [times(row["bytes"]["packed"] / row["bytes"]["dense"])]
        + [times(row["bytes"]["resident"] / row["bytes"]["dense"])]
        for row in result["rows"]
    ]
    head = [_threads(result), "pattern", "batch", "firing", *head, "file bytes", "memory"]
    return markdown(head, rows)


def _kinds(*results: Result) -> str:
    """Python between the kernels, and attention, as shares of a packed network's time."""
    rows = [
        [_threads(result), f"batch {batch}", *(_range(result, batch, k) for k in (REST, ATTENTION))]
        for result in results
        for batch in sorted({row["batch"] for row in result["rows"]})
    ]
    return markdown(["share of the time, least to most", "", REST, ATTENTION], rows)


ATTENTION = "attention"


def _range(result: Result, batch: int, kind: str) -> str:
    shares = [r["profile"].get(kind, 0.0) for r in result["rows"] if r["batch"] == batch]
    return f"{percent(min(shares), digits=0)} to {percent(max(shares), digits=0)}"


def _where(result: Result) -> str:
    return f"{_threads(result)}, {result['machine']['isa']}"


STREAM_PEERS = {
    "c runtime": "C runtime",
    "scipy csr": "scipy CSR",
    "torch csr": "torch CSR",
    "brainevent": "brainevent",
}
"""Others that run a stream of the table, and how it calls them."""


def _streams(*results: Result) -> str:
    rows = [
        [_where(result), row["stream"], row.get("pattern", "2:4"), row["batch"]]
        + ["" if row["rate"] is None else percent(row["rate"])]
        + [f"{row['us']['program']:.0f} µs"]
        + [_over(row, key) for key in ("eager", "compiled", "engine", "onnxruntime")]
        + [
            ", ".join(
                f"{label} {_over(row, k)}" for k, label in STREAM_PEERS.items() if k in row["us"]
            )
        ]
        + [_form(row, "int8"), _form(row, "small")]
        for result in results
        for row in result["rows"]
    ]
    head = ["", "stream", "N:M", "batch", "input", "program", "over eager", "over torch.compile"]
    head += ["over `pack` alone", "over onnxruntime", "over others", "int8", "small"]
    return markdown(head, rows)


OTHERS = {"eager": "eager", "compiled": "torch.compile", "engine": "`pack` alone"}
"""What programs are compared with, and how tables call it."""


def _programs(*results: Result) -> str:
    head = ["", "network", "N:M", "batch", "firing", "program"]
    rows = [
        [_where(result), row["network"], row["pattern"], row["batch"], percent(row["rate"])]
        + [f"{row['ms']['program']:.1f} ms"]
        + [_over(row, other) for other in OTHERS]
        for result in results
        for row in result["rows"]
    ]
    means = [
        [_where(result), key, times(group["mean"]), times(group["least"])]
        for result in results
        for key, group in result["summary"].items()
    ]
    whole = markdown(["", "programs", "geometric mean", "least"], means)
    return f"{whole}\n\n{markdown([*head, *(f'over {o}' for o in OTHERS.values())], rows)}"


def _over(row: dict[str, Any], key: str) -> str:
    return times(row[f"over_{key}"]) if f"over_{key}" in row else ""


def _form(row: dict[str, Any], form: str) -> str:
    """Time of another form of the program, and its layouts' share of the dense fp32 weights."""
    if form not in row["us"]:
        return ""
    share = row["bytes"][form] / row["bytes"]["dense"]
    return f"{row['us'][form]:.0f} µs, {percent(share, digits=0)} of the bytes"


def _instructions(*results: Result) -> str:
    rows = [
        [row["loop"], row["turn"]]
        + [str(row[key]) for key in ("instructions", "vector", "fused", "lookups")]
        for result in results
        for row in result["rows"]
    ]
    return markdown(["loop", "a turn", "instructions", "on vectors", "`fmla`", "`tbl`"], rows)


def _spikes(*results: Result) -> str:
    """How much the engine's spikes differ from eager torch's, and torch's from itself."""
    rows: list[dict[str, Any]] = [row for result in results for row in result["rows"]]

    def most(key: str) -> str:
        return f"{max(row[key] for row in rows):.1e}"

    cells = [
        ["any neuron, fed what the eager model's neurons emit", most("layer_mismatch")],
        ["free run, first neuron that differs", most("first_mismatch")],
        ["free run, all spikes", most("spike_mismatch")],
        ["torch in channels_last against eager, all spikes", most("channels_last_mismatch")],
        ["rows with all predictions equal", _share(rows, lambda r: r["same_predictions"] == 1)],
    ]
    return markdown(["share of spikes that differ", "most of all rows"], cells)


def _share(rows: Iterable[Any], holds: Callable[[Any], bool]) -> str:
    verdicts = [holds(row) for row in rows]
    return f"{sum(verdicts)} of {len(verdicts)}"


CHAPTERS = (
    Chapter(
        "Packed layers",
        ("layers-1t", "layers-2t"),
        "python -m spikenm_fx.bench layers --rates 0.05 0.15 --repeats 5 (and --threads 2)",
        _layers,
        "Over the best dense fp32 path of torch (eager, channels_last, inductor with freezing), "
        "exact up to summation order; the fastest packed kernel of each shape.",
    ),
    Chapter(
        "Packed layers, int8",
        ("layers-int8-1t", "layers-int8-2t"),
        "python -m spikenm_fx.bench layers --int8 --patterns 2:4 --rates 0.1 --repeats 5 "
        "(and --threads 2)",
        _layers,
        "Over dense fp32, and over oneDNN's dense int8, which is given and leaves quantised "
        "tensors, while ours writes fp32, four times the bytes. On CPUs with AMX dense int8 beats "
        "our int8 kernels.",
    ),
    Chapter(
        "What pack chooses",
        ("dispatch-1t", "dispatch-2t", "dispatch-1t-busy2", "dispatch-2t-busy1"),
        "python -m spikenm_fx.bench dispatch (and --threads 2, --busy 2, --patterns 1:1)",
        _dispatch,
        "The engine over the layer as torch runs it. We lose where a call takes microseconds: "
        "`pack` keeps torch's layer there, and our Python is a share of it. At 2:4 the lookup "
        "kernel does not depend on the rate, so no large layer is better dense; with weights that "
        "are dense (1:1) `pack` keeps torch's layer at high rates.",
    ),
    Chapter(
        "Packed networks",
        ("network-1t", "network-2t"),
        "python -m spikenm_fx.bench network --int8 (and --threads 2)",
        _networks,
        "T=4. Least gained is at batch 1, where Python between the kernels counts most; "
        "attention stays torch's. The file of a 2:4 model is about half as large, but memory at "
        "run time is not saved: the layouts that the fastest kernels read are as large as dense "
        "weights or larger. `pack` times its kernels and torch's dense one inside the engine, on "
        "the examples' spikes, and keeps the fastest: dense stays for analog inputs, tiny layers "
        "and dense weights at high firing rates.",
    ),
    Chapter(
        "Streaming",
        ("stream-1t",),
        "python -m spikenm_fx.bench stream --nmnist FILE --c-runtime FOLDER (and --threads 2)",
        _streams,
        "One time step per call, states kept: `pack(model, x, program=True).step(frame)`. Weights "
        "that do not fit the caches, and large batches of images, gain least. Beside it the same "
        'with int8 weights, and with `memory="small"`, whose weights stay as they are stored: '
        "their time, and what they keep in memory. Below 1x the other one wins.",
        later=("stream-2t",),
    ),
    Chapter(
        "Networks as programs",
        (),
        "python -m spikenm_fx.bench programs (and --threads 2)",
        _programs,
        "T=4, a whole input per call: `pack(model, x, program=True)`, over eager and compiled "
        "torch, and over the engine without a program, which times its kernels for each layer. Of "
        "many images at a time both add a row of weights for each spike, as fast as rows are read.",
        later=("programs-1t", "programs-2t", "programs-1t-avx2"),
    ),
    Chapter(
        "Instructions on aarch64",
        ("instructions-aarch64",),
        "python -m nox -s aarch64",
        _instructions,
        "Of the innermost loops, as g++ 12 compiles them for 64-bit Arm; counted in the "
        "disassembly, as no such processor was at hand to time them. What they compute is compared "
        "with x86 bit for bit under qemu-user.",
    ),
    Chapter(
        "The same spikes",
        ("network-1t", "network-2t"),
        "python -m spikenm_fx.bench network --int8 (and --threads 2)",
        _spikes,
        "In free runs one membrane within rounding of its threshold fires otherwise, and networks "
        "amplify it; torch amplifies its own rounding alike. The tests ask for less than 1 in "
        "10,000 in SpikingJelly, snnTorch, Norse and sinabs models.",
    ),
)
