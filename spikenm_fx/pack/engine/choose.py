# SPDX-License-Identifier: Apache-2.0
"""Which backend each packed layer runs on: what is forced, else what is measured to be fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pack.engine.layer import Choice, PackedLayer
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.engine.meter import Meter
from spikenm_fx.pack.engine.products import PackedProducts
from spikenm_fx.pack.turns import rounds, typical
from spikenm_fx.state import as_given, preserved, uncompiled
from spikenm_fx.trace.execution.values import kind_of_values

__all__ = ["LayerDraft", "choose"]

ROUNDS = 4
SECONDS = 0.3  # for more rounds than ROUNDS
MARGIN = 0.95  # a kernel must beat dense by five per cent, more than timing noise
CHANNELS_LAST = "dense channels_last"
DENSE = ("dense", CHANNELS_LAST)
LARGE = 2**26  # bytes of fp32 weights from which on no more than two ways are ready at a time


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
    with torch.no_grad(), preserved(engine, guarded=False, leave=_fixed(layers)), uncompiled():
        _look_at_inputs(engine, args, layers)
    ways = {name: _ways(layer) for name, layer in layers.items()}
    if sum(layer.dense_bytes for layer in layers.values()) < LARGE:
        prepared = {n: {w: _candidate(layers[n], w) for w in own} for n, own in ways.items()}
        found = _times(engine, args, layers, prepared)
        chosen = {n: prepared[n][_fastest(milliseconds)] for n, milliseconds in found.items()}
    else:
        chosen, found = _by_pairs(engine, args, layers, ways)
    # Only now: what is preserved meanwhile would take a choice back as well.
    for name, layer in layers.items():
        layer.packed.adopt(chosen[name])
        layer.packed.expect_counts()
        # The two memory formats of torch's layer are one choice.
        for way, value in found[name].items():
            choice = "dense" if way in DENSE else way
            layer.milliseconds[choice] = min(value, layer.milliseconds.get(choice, value))


def _by_pairs(
    engine: nn.Module,
    args: tuple[Any, ...],
    layers: Mapping[str, LayerDraft],
    ways: Mapping[str, list[str]],
) -> tuple[dict[str, PackedLayer], dict[str, dict[str, float]]]:
    """The fastest way of each layer, where all ways at once would take too much memory.

    The fastest so far of each layer meets one other after the other, and times are scaled to what
    it took first.

    Returns:
        By layer the way to run it, and milliseconds by name of the way.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in layers}
    best = {name: own[0] for name, own in ways.items()}
    holders = {}
    for name, layer in layers.items():
        layer.packed.choose("reference")  # hold nothing else
        holders[name] = _candidate(layer, best[name])
    every = list(dict.fromkeys(way for own in ways.values() for way in own))
    for way in [way for way in every if way != "dense"] or every:
        pairs = {name: {best[name]: holder} for name, holder in holders.items()}
        for name, own in ways.items():
            if way in own:
                pairs[name].setdefault(way, _candidate(layers[name], way))
        for name, milliseconds in _times(engine, args, layers, pairs).items():
            now = milliseconds.get(best[name])
            if now is None:
                continue  # it does not run
            known = found[name].setdefault(best[name], now)
            if way in milliseconds:
                found[name][way] = milliseconds[way] * known / now
            if found[name].get(way, known) < known:
                best[name], holders[name] = way, pairs[name][way]
        pairs.clear()
    for name, milliseconds in found.items():
        fastest = _fastest(milliseconds)
        if fastest != best[name]:
            del holders[name]
            holders[name] = _candidate(layers[name], fastest)
    return holders, found


def _times(
    engine: nn.Module,
    args: tuple[Any, ...],
    layers: Mapping[str, LayerDraft],
    prepared: Mapping[str, Mapping[str, PackedLayer]],
) -> dict[str, dict[str, float]]:
    """Milliseconds of each layer by way, of those that ran."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {way: [] for way in ways} for name, ways in prepared.items()
    }
    every = list(dict.fromkeys(way for ways in prepared.values() for way in ways))
    with torch.no_grad(), preserved(engine, guarded=False, leave=_fixed(layers)), uncompiled():
        for counted in rounds(ROUNDS, SECONDS):
            for way in every:  # in turn, so that drifts of the machine hit all alike
                timed = {n: Meter() for n, ways in prepared.items() if way in ways}
                for name, layer in layers.items():
                    ways = prepared[name]
                    layer.packed.adopt(ways[way] if way in ways else next(iter(ways.values())))
                    layer.packed.meter = timed.get(name)
                engine(*as_given(args))
                for name, meter in timed.items():
                    if counted and meter.seconds:
                        seconds[name][way].append(meter.seconds)
    for layer in layers.values():
        layer.packed.meter = None
    return {
        name: {way: 1e3 * typical(runs) for way, runs in ways.items() if runs}
        for name, ways in seconds.items()
    }


def _fixed(layers: Mapping[str, LayerDraft]) -> list[Tensor]:
    return [t for layer in layers.values() for t in layer.packed.fixed_tensors()]


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
        engine(*as_given(args))
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


def _ways(layer: LayerDraft) -> list[str]:
    """Ways to run the layer: its choices, torch's dense layer in both memory formats."""
    choices: list[str] = list(layer.packed.candidates())
    if layer.rate is None:
        choices = [choice for choice in choices if choice in ("dense", "fma")]
    return [*choices, CHANNELS_LAST] if layer.packed.geometry.spatial == 2 else choices


def _candidate(layer: LayerDraft, way: str) -> PackedLayer:
    """The layer, ready to run one way."""
    packed = layer.packed
    choice: Any = "dense" if way in DENSE else way
    made = PackedLayer(packed.packed, packed.bias, name=packed.name, choice=choice)
    if way == CHANNELS_LAST:
        made.prefer_channels_last()
    return made


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
