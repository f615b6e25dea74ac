# SPDX-License-Identifier: Apache-2.0
"""Spikes of an engine layer by layer, each fed what the model's own neurons emit.

In a free run, one membrane that rounding puts on the other side of its threshold changes what all
later layers see, and the share of other spikes there tells nothing about their kernels.  Here the
engine's neurons hand on the model's spikes instead of their own (teacher forcing), still as bits
and through the same kernels, and every neuron is judged on the input it had in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.native.library import kernels
from spikenm_fx.pack.check.difference import NeuronDifference, difference, first_margin
from spikenm_fx.pack.engine.lazy import LazyTensor, SpikeBits
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.state import as_given
from spikenm_fx.trace import NeuronSpec, find_neurons

__all__ = ["forced", "forced_mismatch"]

Run = Callable[[nn.Module], Any]


def forced_mismatch(model: nn.Module, engine: nn.Module, *args: Any) -> dict[str, float]:
    """Share of other spikes of each neuron, on the inputs that it has in the model.

    Args:
        model: the eager model, in eval mode.
        engine: what :func:`~spikenm_fx.pack.api.pack` made of it.
        args: of one call; both must be at rest.

    Returns:
        By neuron, see :func:`forced`.  Both modules keep the state that the call leaves them in.
    """
    _, _, neurons = forced(model, engine, lambda module: module(*as_given(args)))
    return {neuron.name: neuron.share for neuron in neurons}


def forced(
    model: nn.Module, engine: nn.Module, run: Run
) -> tuple[Any, Any, tuple[NeuronDifference, ...]]:
    """Run the model, then the engine with the model's spikes in place of its own.

    Args:
        model: the eager model, in eval mode and at rest.
        engine: what :func:`~spikenm_fx.pack.api.pack` made of it, at rest.
        run: calls a module on one sample, as often as that has steps outside of the module.

    Returns:
        The outputs of both, and the neurons in the order in which they first ran.  Neurons that
        never run, or that emit no spikes, are left out.
    """
    spiking = {name: spec for name, spec in find_neurons(model).items() if spec.output == "spike"}
    received: dict[str, list[Tensor]] = {name: [] for name in spiking}
    emitted: dict[str, list[Tensor]] = {name: [] for name in spiking}
    differing: dict[str, list[Tensor]] = {name: [] for name in spiking}
    found: dict[str, NeuronDifference] = {}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, out: Any) -> None:
            if args:
                received[name].append(args[0].clone())
                emitted[name].append(_spikes(out).clone())

        return hook

    def force(name: str, spec: NeuronSpec) -> Any:
        calls = zip(received[name], emitted[name], strict=True)

        def hook(_module: nn.Module, args: Any, out: Any) -> Any:
            call, own = next(calls, None), _spikes(out)
            if call is None or own.shape != call[1].shape:  # more calls, or on something else
                return None
            x, wanted = call
            each = found.setdefault(name, NeuronDifference(name))
            each.spikes += wanted.numel()
            differing[name].append(_values(own) != wanted)
            each.others += int(differing[name][-1].sum())
            each.steps += 1 if spec.time_axis is None else x.shape[spec.time_axis]
            each.received = max(each.received, difference(_values(args[0]), x))
            given = _as_bits(wanted, own) if isinstance(own, LazyTensor) else wanted
            return (given, *out[1:]) if isinstance(out, tuple) else given

        return hook

    # A recurrent layer reads what its neuron emits, so that no input of the neuron shows its error.
    inner: dict[str, list[tuple[Tensor, Tensor]]] = {
        name: []
        for name, module in model.named_modules()
        if is_weight_layer(module) and any(name.startswith(f"{outer}.") for outer in spiking)
    }

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, out: Tensor) -> None:
            inner[name].append((args[0].clone(), out.clone()))

        return hook

    with torch.no_grad():
        hooks = {name: record(name) for name in spiking} | {name: watch(name) for name in inner}
        expected = _hooked(model, hooks, run)
        output = _hooked(engine, {name: force(name, spec) for name, spec in spiking.items()}, run)
        for name, each in found.items():
            if each.others:
                calls = received[name], emitted[name], differing[name]
                each.margin = first_margin(spiking[name], *calls)
        for name, seen in inner.items():
            outer = next(n for n in spiking if name.startswith(f"{n}."))
            layer = engine.get_submodule(name)
            for x, wanted in seen:
                if outer in found:
                    worst = difference(_values(layer(x)), wanted)
                    found[outer].inner = max(found[outer].inner, worst)
    return expected, output, tuple(each for each in found.values() if each.spikes)


def _hooked(module: nn.Module, hooks: dict[str, Any], run: Run) -> Any:
    handles = [
        module.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()
    ]
    try:
        return run(module)
    finally:
        for handle in handles:
            handle.remove()


def _spikes(out: Any) -> Tensor:
    spikes: Tensor = out[0] if isinstance(out, tuple) else out
    return spikes


def _values(x: Tensor) -> Tensor:
    """What a layer that waits would have put out; it still waits."""
    return x.materialize() if isinstance(x, LazyTensor) else x


def _as_bits(spikes: Tensor, like: LazyTensor) -> Tensor:
    """The same form as a fused neuron's output: bits, seen through the same views."""
    source, meta = like.source, like.meta_tensor
    native = kernels()
    if native is None or not isinstance(source, SpikeBits) or not source.binary:
        return spikes
    # The memory of the output runs row by row, as that of its bits does.
    rows = torch.empty_strided(meta.shape, meta.stride()).copy_(spikes)
    bits = torch.empty_like(source.bits)
    native.pack_rows(rows.data_ptr(), bits.shape[0], 1, source.channels, bits.data_ptr(), 1)
    forced = SpikeBits(bits, source.images, source.size, source.layout, source.channels)
    return LazyTensor(forced, meta, like.views)
