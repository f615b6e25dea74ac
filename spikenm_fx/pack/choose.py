# SPDX-License-Identifier: Apache-2.0
"""Which backend each packed layer runs on: what is forced, else what is measured to be fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pack.layer import Choice, PackedLayer
from spikenm_fx.pack.lazy import LazyTensor
from spikenm_fx.pack.meter import Meter
from spikenm_fx.trace.snapshot import preserved

__all__ = ["LayerDraft", "choose"]

ROUNDS = 4
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
    """Time each layer's candidates where they will run: inside the engine, on the examples.

    Neurons that are fused, conversions of the input and what lies in the caches all count.
    """
    with torch.no_grad(), preserved(engine):
        _look_at_inputs(engine, args, layers)
        prepared = {name: _candidates(layer) for name, layer in layers.items()}
        every = {choice: None for ways in prepared.values() for choice in ways}
        for counted in [False] + [True] * ROUNDS:
            for choice in every:
                timed = {n: Meter() for n, ways in prepared.items() if choice in ways}
                for name, layer in layers.items():
                    layer.packed.adopt(prepared[name].get(choice, prepared[name]["dense"]))
                    layer.packed.meter = timed.get(name)
                engine(*args)
                for name, meter in timed.items():
                    if counted and meter.seconds:
                        best = layers[name].milliseconds.get(choice, float("inf"))
                        layers[name].milliseconds[choice] = min(best, meter.seconds * 1e3)
    # Only now: what is preserved above would take a choice back as well.
    for name, layer in layers.items():
        layer.packed.meter = None
        layer.packed.adopt(prepared[name][_fastest(layer.milliseconds)])
        layer.packed.expect_counts()


def _look_at_inputs(
    engine: nn.Module, args: tuple[Any, ...], layers: Mapping[str, LayerDraft]
) -> None:
    """Note the rate and the digits of what reaches each layer last."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.packed.register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name, layer in layers.items()
    ]
    try:
        engine(*args)
    finally:
        for hook in hooks:
            hook.remove()
    for name, x in inputs.items():
        packed = layers[name].packed
        if packed.geometry.spatial and x.dim() == packed.geometry.spatial + 3:
            x = x.flatten(0, 1)
        bits = packed.bits_of(x)
        layers[name].planes = 1 if bits is None else bits.planes
        layers[name].rate = _rate(x, counts=bits is not None)


def _candidates(layer: LayerDraft) -> dict[Choice, PackedLayer]:
    packed = layer.packed
    choices = packed.candidates()
    if layer.rate is None:
        choices = [choice for choice in choices if choice in ("dense", "fma")]
    return {
        choice: PackedLayer(packed.packed, packed.bias, name=packed.name, choice=choice)
        for choice in choices
    }


def _fastest(milliseconds: Mapping[str, float]) -> Any:
    if not milliseconds:
        return "dense"
    best = min(milliseconds, key=lambda choice: milliseconds[choice])
    return best if milliseconds[best] <= MARGIN * milliseconds["dense"] else "dense"


def _rate(x: Tensor, *, counts: bool) -> float | None:
    """Share of spikes, or of counts that are not zero; None if there is anything else."""
    plain = x.materialize() if isinstance(x, LazyTensor) else x
    if not plain.numel():
        return None
    if not counts and not bool(((plain == 0) | (plain == 1)).all()):
        return None
    return float((plain != 0).float().mean())
