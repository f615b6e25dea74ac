# SPDX-License-Identifier: Apache-2.0
"""Which backend each packed layer runs on: what is forced, else what is measured to be fastest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pack.engine.layer import Choice, PackedLayer
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.engine.meter import Meter
from spikenm_fx.pack.engine.products import PackedProducts
from spikenm_fx.pack.turns import typical
from spikenm_fx.state import preserved, uncompiled
from spikenm_fx.trace.execution.values import kind_of_values

__all__ = ["LayerDraft", "choose"]

ROUNDS = 4
MOST_ROUNDS = 40  # of models that run in microseconds
SECONDS = 0.3  # for more rounds than ROUNDS
MARGIN = 0.95  # a kernel must beat dense by five per cent, more than timing noise
CHANNELS_LAST = "dense channels_last"
DENSE = ("dense", CHANNELS_LAST)


@dataclass(slots=True, eq=False)
class LayerDraft:
    """A packed layer under construction.

    Attributes:
        packed: the layer.
        dense_bytes: of its fp32 weight.
        before: class and attributes that the module had, to put back.
        norm: name and module of the norm that is folded into it.
        neuron: the neuron that is fused with it, or "".
        note: what its user should know.
        planes: binary digits of its input.
        rate: share of its input that is not zero.
        milliseconds: by choice.
    """

    packed: PackedLayer
    dense_bytes: int
    before: tuple[type[nn.Module], dict[str, Any]] = (nn.Module, {})
    norm: tuple[str, nn.Module] | None = None
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
    with torch.no_grad(), preserved(engine, guarded=False), uncompiled():
        _look_at_inputs(engine, args, layers)
        prepared = {name: _candidates(layer) for name, layer in layers.items()}
        seconds: dict[str, dict[str, list[float]]] = {
            name: {way: [] for way in ways} for name, ways in prepared.items()
        }
        every = list(dict.fromkeys(way for ways in prepared.values() for way in ways))
        for counted in _rounds():
            for way in every:  # in turn, so that drifts of the machine hit all alike
                timed = {n: Meter() for n, ways in prepared.items() if way in ways}
                for name, layer in layers.items():
                    layer.packed.adopt(prepared[name].get(way, prepared[name]["dense"]))
                    layer.packed.meter = timed.get(name)
                engine(*args)
                for name, meter in timed.items():
                    if counted and meter.seconds:
                        seconds[name][way].append(meter.seconds)
    # Only now: what is preserved above would take a choice back as well.
    for name, layer in layers.items():
        layer.packed.meter = None
        milliseconds = {way: 1e3 * typical(runs) for way, runs in seconds[name].items() if runs}
        layer.packed.adopt(prepared[name][_fastest(milliseconds)])
        layer.packed.expect_counts()
        # The two memory formats of torch's layer are one choice.
        for way, value in milliseconds.items():
            choice = prepared[name][way].choice
            layer.milliseconds[choice] = min(value, layer.milliseconds.get(choice, value))


def _rounds() -> Iterator[bool]:
    """Whether each round counts: not the first; the more rounds, the shorter they are."""
    yield False
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= ROUNDS and time.perf_counter() - start > SECONDS:
            return
        yield True


def _look_at_inputs(
    engine: nn.Module, args: tuple[Any, ...], layers: Mapping[str, LayerDraft]
) -> None:
    """Note the rate and the digits of what reaches each layer last."""
    inputs: dict[str, Tensor] = {}
    hooks = []
    for name, layer in layers.items():
        if isinstance(layer.packed, PackedProducts):
            layer.packed.watched = []
        else:
            hook = _keeping(inputs, name)
            hooks.append(layer.packed.register_forward_pre_hook(hook))
    try:
        engine(*args)
    finally:
        for handle in hooks:
            handle.remove()
        for name, layer in layers.items():
            if isinstance(layer.packed, PackedProducts):
                for x in layer.packed.watched or ():
                    inputs[name] = x
                layer.packed.watched = None
    for name, x in inputs.items():
        packed = layers[name].packed
        if packed.geometry.spatial and x.dim() == packed.geometry.spatial + 3:
            x = x.flatten(0, 1)
        bits = packed.bits_of(x)
        layers[name].planes = 1 if bits is None else bits.planes
        layers[name].rate = _rate(x, counts=bits is not None)


def _keeping(inputs: dict[str, Tensor], name: str) -> Any:
    """A hook that keeps what comes last."""
    return lambda _module, args: inputs.__setitem__(name, args[0])


def _candidates(layer: LayerDraft) -> dict[str, PackedLayer]:
    """Ways to run the layer, by name: its choices, torch's dense layer in both memory formats."""
    packed = layer.packed
    choices = packed.candidates()
    if layer.rate is None:
        choices = [choice for choice in choices if choice in ("dense", "fma")]
    found: dict[str, PackedLayer] = {
        choice: PackedLayer(packed.packed, packed.bias, name=packed.name, choice=choice)
        for choice in choices
    }
    if packed.geometry.spatial == 2:
        found[CHANNELS_LAST] = PackedLayer(packed.packed, packed.bias, name=packed.name)
        found[CHANNELS_LAST].prefer_channels_last()
    return found


def _fastest(milliseconds: Mapping[str, float]) -> str:
    if not milliseconds:
        return "dense"
    dense = min((way for way in milliseconds if way in DENSE), key=milliseconds.__getitem__)
    best = min(milliseconds, key=milliseconds.__getitem__)
    return best if milliseconds[best] <= MARGIN * milliseconds[dense] else dense


def _rate(x: Tensor, *, counts: bool) -> float | None:
    """Share of spikes, or of counts that are not zero; None if there is anything else."""
    plain = x.materialize() if isinstance(x, LazyTensor) else x
    if not plain.numel():
        return None
    if not counts and kind_of_values(plain) != "spike":
        return None
    return float((plain != 0).float().mean())
