# SPDX-License-Identifier: Apache-2.0
"""Spikes of an engine layer by layer, each fed what the model's own neurons emit.

In a free run, one membrane that rounding puts on the other side of its threshold changes what all
later layers see, and the share of other spikes there tells nothing about their kernels.  Here the
engine's neurons hand on the model's spikes instead of their own (teacher forcing), still as bits
and through the same kernels, and every neuron is judged on the input it had in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.native.library import kernels
from spikenm_fx.pack.lazy import LazyTensor, SpikeBits
from spikenm_fx.trace import find_neurons

__all__ = ["forced_mismatch"]


def forced_mismatch(model: nn.Module, engine: nn.Module, *args: Any) -> dict[str, float]:
    """Share of other spikes of each neuron, on the inputs that it has in the model.

    Args:
        model: the eager model, in eval mode.
        engine: what :func:`~spikenm_fx.pack.engine.pack` made of it.
        args: of one call; both must be at rest.

    Returns:
        By neuron, in the order of the model's modules; neurons that are never called, or that emit
        no spikes, are left out.  Both modules keep the state that the call leaves them in.
    """
    spiking = [name for name, spec in find_neurons(model).items() if spec.output == "spike"]
    emitted: dict[str, list[Tensor]] = {name: [] for name in spiking}
    others: dict[str, int] = {}

    def record(name: str) -> Any:
        return lambda _m, _a, out: emitted[name].append(_spikes(out).clone())

    def force(name: str) -> Any:
        calls = iter(emitted[name])

        def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
            own, wanted = _spikes(out), next(calls)
            others[name] = others.get(name, 0) + int((own != wanted).sum())
            forced = _as_bits(wanted, own) if isinstance(own, LazyTensor) else wanted
            return (forced, *out[1:]) if isinstance(out, tuple) else forced

        return hook

    with torch.no_grad():
        _hooked(model, {name: record(name) for name in spiking}, args)
        _hooked(engine, {name: force(name) for name in spiking}, args)
    totals = {name: sum(spikes.numel() for spikes in calls) for name, calls in emitted.items()}
    return {name: others[name] / total for name, total in totals.items() if total}


def _hooked(module: nn.Module, hooks: dict[str, Any], args: tuple[Any, ...]) -> None:
    handles = [
        module.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()
    ]
    try:
        module(*args)
    finally:
        for handle in handles:
            handle.remove()


def _spikes(out: Any) -> Tensor:
    spikes: Tensor = out[0] if isinstance(out, tuple) else out
    return spikes


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
