# SPDX-License-Identifier: Apache-2.0
"""Streaming, one time step per call: a program against eager and compiled torch, and others."""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.bench import peers
from spikenm_fx.bench.measure import add_resuming, interleaved, measured, positive
from spikenm_fx.bench.subjects import prune
from spikenm_fx.pack import pack
from spikenm_fx.pattern import NM

__all__ = ["main"]

STREAMS = {"700-512-512-20": (700, 512, 512, 20), "2312-256-10": (2312, 256, 10)}
STREAMS |= {"700-2048-2048-20": (700, 2048, 2048, 20)}
LAYERS = {"Linear 512x512": 512, "Linear 4096x4096": 4096}
STEPS = 200  # a stream goes on: the first steps, which fetch all weights from memory, weigh little
NMNIST = "N-MNIST recordings"
TWO_OF_FOUR = NM(2, 4)


@dataclass(frozen=True)
class Stream:
    """A network, frames for it, and how it forgets its state.

    Attributes:
        model: takes one step a call.
        frames: ``(steps, batch, ...)``.
        reset: forgets the state of a model that is no program.
    """

    model: nn.Module
    frames: Tensor
    reset: Callable[[nn.Module], None]


def main(arguments: list[str]) -> None:
    """Time every stream and write ``results/stream-Nt.json``, row by row."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench stream", description=__doc__)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03, 0.1], help="of the input")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--no-peers", action="store_true", help="skip what others have")
    parser.add_argument("--c-runtime", type=Path, help="a checkout of karol-jurzec/snn-generator")
    parser.add_argument("--nmnist", type=Path, help="nmnist_net.npz, a real network and recordings")
    add_resuming(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = {
        "clock": "CPU time of the thread, median"
        if options.threads == 1
        else "wall, least of the repeats",
        "repeats": options.repeats,
        "steps": STEPS,
        "compiled": not options.no_compile,
        "peers": not options.no_peers,
    }
    wanted: dict[str, Callable[[], dict[str, Any]]] = {
        f"{name} rate {rate:.0%}": partial(_row, name, rate, 1, options)
        for name, rate in itertools.product(STREAMS, options.rates)
    }
    wanted |= {
        f"{name} {nm} rate {rate:.0%}": partial(_row, name, rate, 1, options, NM.parse(nm))
        for name, nm, rate in itertools.product(LAYERS, ("2:4", "1:8"), (0.05, 0.15))
    }
    if options.nmnist is not None:
        wanted |= {f"{NMNIST} batch {n}": partial(_row, NMNIST, None, n, options) for n in (1, 36)}
    measured(f"stream-{options.threads}t", wanted, about, lambda rows: {"rows": len(rows)}, options)


def _row(
    name: str, rate: float | None, batch: int, options: Any, nm: NM = TWO_OF_FOUR
) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()  # else it gives up compiling after a few rows
    if name == NMNIST:
        stream = _recordings(options.nmnist, batch)
    elif name in LAYERS:
        size = LAYERS[name]
        assert rate is not None
        frames = (torch.rand(STEPS, 1, size) < rate).float()
        stream = Stream(nn.Sequential(nn.Linear(size, size)), frames, lambda _: None)
    else:
        assert rate is not None
        stream = _network(STREAMS[name], rate)
    prune(stream.model.eval(), nm, every=True)
    program: Any = pack(stream.model, stream.frames[0], program=True)
    candidates: dict[str, nn.Module] = {
        "eager": stream.model,
        "engine": pack(stream.model, stream.frames[0]),
    }
    if not options.no_compile:
        candidates["compiled"] = torch.compile(copy.deepcopy(stream.model), dynamic=False)  # type: ignore[assignment]
    with torch.no_grad():
        calls = {key: _call(stream, module) for key, module in candidates.items()}
        calls["program"] = _steps(program, stream.frames)
        small: Any = pack(stream.model, stream.frames[0], program=True, memory="small")
        calls["small"] = _steps(small, stream.frames)
        int8: Any = pack(stream.model, stream.frames[0], program=True, dtype=torch.int8)
        calls["int8"] = _steps(int8, stream.frames)
        if not options.no_peers:
            calls |= _peers(name, stream, options)
        answers = {key: call() for key, call in calls.items()}
        seconds = interleaved(
            calls,
            repeats=options.repeats,
            clock=time.thread_time if options.threads == 1 else time.perf_counter,
            statistic=statistics.median if options.threads == 1 else min,
        )
    row: dict[str, Any] = {
        "stream": name,
        "pattern": str(nm),
        "rate": rate,
        "batch": batch,
        "us": {key: 1e6 * value / len(stream.frames) for key, value in seconds.items()},
        "same_answers": {k: _same(a, answers["eager"]) for k, a in answers.items() if k != "eager"},
    }
    for key in seconds:
        if key != "program":
            row[f"over_{key}"] = seconds[key] / seconds["program"]
    row["bytes"] = {
        "dense": 4 * sum(p.numel() for p in stream.model.parameters() if p.dim() > 1),
        "program": sum(program.layer_bytes),
        "small": sum(small.layer_bytes),
        "int8": sum(int8.layer_bytes),
    }
    ratios = "  ".join(f"{key} {row[key]:.2f}x" for key in row if key.startswith("over_"))
    times = "  ".join(f"{key} {value:.1f}" for key, value in row["us"].items())
    at = "" if rate is None else f"rate {rate:.0%} "
    print(f"{name:<18} {at}batch {batch}  us a step: {times}  {ratios}", flush=True)
    return row


def _peers(name: str, stream: Stream, options: Any) -> dict[str, Callable[[], Tensor]]:
    """What others make of the same network and frames."""
    model, frames = stream.model, stream.frames
    stream.reset(model)
    found: dict[str, Callable[[], Tensor]] = {"onnxruntime": peers.onnx_steps(model, frames)}
    if name in LAYERS:
        layer: Any = model.get_submodule("0")
        found |= peers.csr_layers(layer, frames)
        events = peers.brainevent_layer(layer, frames)
        found |= {} if events is None else {"brainevent": events}
    if name == NMNIST and options.c_runtime is not None:
        found["c runtime"] = peers.CRuntime(options.c_runtime, model).steps(frames)
    return found


def _call(stream: Stream, module: nn.Module) -> Callable[[], Tensor]:
    # A compiled module wraps the one that holds the state.
    target: nn.Module = getattr(module, "_orig_mod", module)

    def call() -> Tensor:
        stream.reset(target)
        return _total([_first(module(frame)) for frame in stream.frames])

    return call


def _steps(program: Any, frames: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        program.reset()
        return _total([_first(program.step(frame)) for frame in frames])

    return call


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _total(outputs: list[Tensor]) -> Tensor:
    return torch.stack(outputs).sum(0)


def _same(found: Tensor, wanted: Tensor) -> float:
    """Share of samples with the same answer."""
    return float((found.argmax(-1) == wanted.argmax(-1)).float().mean())


def _network(sizes: tuple[int, ...], rate: float) -> Stream:
    from spikingjelly.activation_based import functional, neuron

    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        # About one neuron in ten fires in a step.
        nn.init.normal_(linear.weight, std=2.5 * (0.1 * inputs) ** -0.5)
        layers += [linear, neuron.LIFNode(tau=2.0, v_threshold=2.0)]
    frames = (torch.rand(STEPS, 1, sizes[0]) < rate).float()
    return Stream(nn.Sequential(*layers), frames, functional.reset_net)


def _recordings(file: Path, batch: int) -> Stream:
    """The network of a file in snnTorch's keys, and its recordings, repeated to a batch."""
    import numpy as np
    import snntorch
    from snntorch import utils

    data = np.load(file, allow_pickle=False)
    leaky = partial(snntorch.Leaky, beta=0.5, init_hidden=True)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 5),
        nn.MaxPool2d(2),
        leaky(),
        nn.Conv2d(12, 32, 5),
        nn.MaxPool2d(2),
        leaky(),
        nn.Flatten(),
        nn.Linear(800, 10),
        leaky(output=True),
    )
    weights = {
        key.removeprefix("weight_"): torch.from_numpy(data[key])
        for key in data.files
        if key.startswith("weight_")
    }
    model.load_state_dict(weights, strict=False)
    labels = [key for key in data.files if key.startswith("frames_")]
    frames = torch.stack([torch.from_numpy(data[key]).float() for key in labels], dim=1)
    frames = frames[:, torch.arange(batch) % len(labels)].contiguous()
    return Stream(model, frames, lambda module: utils.reset(module))
