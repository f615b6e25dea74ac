# SPDX-License-Identifier: Apache-2.0
"""Which backend each packed layer runs on: what is forced, else what is measured to be fastest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pack.layer import Choice, PackedLayer
from spikenm_fx.pack.lazy import LazyTensor
from spikenm_fx.pack.spikes import SpikeBits
from spikenm_fx.trace.snapshot import preserved

__all__ = ["LayerDraft", "choose"]

ROUNDS = 5
MARGIN = 0.97  # a kernel must beat dense by three per cent, more than timing noise


@dataclass(slots=True, eq=False)
class LayerDraft:
    """A packed layer under construction."""

    packed: PackedLayer
    dense_bytes: int
    neuron: str = ""
    note: str = ""
    planes: int = 1
    rate: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)


def choose(
    engine: nn.Module,
    args: tuple[Any, ...] | None,
    layers: Mapping[str, LayerDraft],
    backend: str | Mapping[str, str],
) -> None:
    """Give every layer its backend: forced, or the fastest on what the examples bring to it.

    Raises:
        PackError: for a backend or a layer that does not exist, or cannot be combined.
    """
    if isinstance(backend, Mapping):
        unknown = sorted(set(backend) - set(layers))
        if unknown:
            raise PackError(
                f"backend= names {unknown[0]!r}, which is no packed layer; there are "
                f"{', '.join(list(layers)[:5])} ..."
            )
        for name, choice in backend.items():
            layers[name].packed.choose(choice)  # type: ignore[arg-type]
        return
    if backend == "auto":
        if args is not None:
            _measure(engine, args, layers)
        return
    for layer in layers.values():
        possible = [*layer.packed.candidates(), "reference"]
        wanted: Any = backend if backend in possible else "dense"
        if backend not in get_args(Choice):
            layer.packed.choose(backend)  # type: ignore[arg-type]  # raises, naming the known ones
        layer.packed.choose(wanted)


def _measure(engine: nn.Module, args: tuple[Any, ...], layers: Mapping[str, LayerDraft]) -> None:
    """Time each layer's candidates on the inputs that the examples bring to it."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.packed.register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), preserved(engine):
            engine(*args)
            for name, layer in layers.items():
                if name in inputs:
                    _measure_layer(layer, inputs[name])
    finally:
        for hook in hooks:
            hook.remove()
    # Only now: what is preserved above would take a choice back as well.
    for layer in layers.values():
        layer.packed.choose(_fastest(layer.milliseconds))


def _fastest(milliseconds: Mapping[str, float]) -> Any:
    if not milliseconds:
        return "dense"
    best = min(milliseconds, key=lambda choice: milliseconds[choice])
    return best if milliseconds[best] <= MARGIN * milliseconds["dense"] else "dense"


def _measure_layer(layer: LayerDraft, x: Tensor) -> None:
    packed = layer.packed
    spatial = packed.geometry.spatial
    if spatial and x.dim() == spatial + 3:
        x = x.flatten(0, 1)
    bits = packed.bits_of(x)
    layer.planes = 1 if bits is None else bits.planes
    layer.rate = _rate(x, counts=bits is not None)
    if not x.numel() or (spatial and x.dim() != spatial + 2):
        return
    candidates = packed.candidates()
    if layer.rate is None:
        candidates = [c for c in candidates if c in ("dense", "fma")]
    seconds: dict[Choice, list[float]] = {choice: [] for choice in candidates}
    copies = {choice: _prepared(packed, choice) for choice in candidates}
    for _ in range(ROUNDS):
        for choice, prepared in copies.items():
            seconds[choice].append(_time(prepared, x))
    layer.milliseconds = {c: min(s) * 1e3 for c, s in seconds.items()}  # others only slow down


def _prepared(packed: PackedLayer, choice: Choice) -> PackedLayer:
    return PackedLayer(packed.packed, packed.bias, name=packed.name, choice=choice)


def _time(layer: PackedLayer, x: Tensor) -> float:
    layer.run(x)  # its weights come into the cache
    if isinstance(x, LazyTensor) and isinstance(x.source, SpikeBits):
        x.source.forget()  # values, where the layer wants them, are part of its price
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    layer.run(x)
    return clock() - start


def _rate(x: Tensor, *, counts: bool) -> float | None:
    """Share of spikes, or of counts that are not zero; None if there is anything else."""
    plain = x.materialize() if isinstance(x, LazyTensor) else x
    if not plain.numel():
        return None
    if not counts and not bool(((plain == 0) | (plain == 1)).all()):
        return None
    return float((plain != 0).float().mean())
