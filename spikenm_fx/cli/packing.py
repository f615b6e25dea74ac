# SPDX-License-Identifier: Apache-2.0
"""The command line's use of packing: one place, so that the commands say the same of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.plan.plan import Plan
from spikenm_fx.plan.weights import RAW

__all__ = ["KernelChoice", "kernel_choices", "pack_model"]


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """How one layer will run.

    Attributes:
        kernel: the chosen one.
        gain: dense time over its time, measured; None where it was not.
        rate: share of the example's input that spikes; None where it is not known.
        note: what keeps it from running better.
    """

    kernel: str = "-"
    gain: float | None = None
    rate: float | None = None
    note: str = ""


def kernel_choices(model: nn.Module, batch: Tensor) -> dict[str, KernelChoice]:
    """How each layer of a folded model will run here, by name."""
    from spikenm_fx.pack import pack, packing

    found = packing(pack(model, batch))
    return {
        layer.name: KernelChoice(layer.choice, layer.gain, layer.rate, layer.note)
        for layer in found.layers
    }


def pack_model(model: nn.Module, decided: Plan, out: Path) -> dict[str, tuple[int, int]]:
    """Write the planned layers packed, all other tensors as they are, raw parameters among them.

    Returns:
        Dense and packed bytes of each packed weight, by layer.

    Raises:
        PackError: if raw parameters are all that is sparse.
    """
    from spikenm_fx.pack import LayerGeometry, pack_weight, save_packed

    weights, sizes = {}, {}
    for entry in decided.sparse:
        if entry.kind == RAW:
            continue  # stays among the other tensors, zeros and all
        layer = model.get_submodule(entry.name)
        geometry = LayerGeometry.of_layer(layer, name=entry.name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert entry.nm is not None
        packed = pack_weight(weight.detach(), entry.nm, geometry=geometry, name=entry.name)
        weights[entry.name] = packed
        sizes[entry.name] = (weight.numel() * weight.element_size(), packed.nbytes)
    if not weights:
        raw = ", ".join(entry.name for entry in decided.sparse)
        raise PackError(
            f"nothing to pack: only raw parameters are N:M ({raw}), and packed files hold layers; "
            "the checkpoint itself holds their zeros"
        )
    taken = {f"{name}.weight" for name in weights}
    rest = {key: value for key, value in model.state_dict().items() if key not in taken}
    save_packed(out, weights, tensors=rest)
    return sizes
