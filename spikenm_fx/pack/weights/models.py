# SPDX-License-Identifier: Apache-2.0
"""Whole models in packed files: which weights at which pattern, and the state that comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pack.weights.files import load_packed, save_packed
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight, unpack_weight
from spikenm_fx.plan.plan import Plan
from spikenm_fx.plan.weights import RAW
from spikenm_fx.verify import verify

__all__ = ["dense_state", "save_packed_model", "tightest_plan", "unpacked_state"]


_STILL_SMALLER = 0.51  # half the values and their indices: a denser pattern stores little less


def tightest_plan(model: nn.Module, decided: Plan) -> Plan:
    """``decided`` with the sparsest pattern that each layer's weight really has.

    A 1:4 weight is 2:4 too, and would take twice the bytes if it were stored so.  Layers that
    ``decided`` keeps dense are taken in where at most half of each block is not zero.

    Args:
        model: folded or plain, with the weights that are to be stored.
        decided: what is required at least; weights that have no pattern keep its decision.
    """
    found = {layer.name: layer.found for layer in verify(model).layers}
    return replace(
        decided,
        layers=tuple(
            replace(entry, nm=nm, action="sparsify", padded=False)
            if entry.kind != RAW
            and (nm := found.get(entry.name)) is not None
            and nm.density < (entry.nm.density if entry.nm else _STILL_SMALLER)
            else entry
            for entry in decided.layers
        ),
    )


def save_packed_model(
    out: str | Path,
    model: nn.Module,
    decided: Plan,
    *,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, int]]:
    """Write the planned layers packed, all other tensors as they are, raw parameters among them.

    Args:
        out: file to write, complete or not at all.
        model: folded or plain; its planned layers are N:M.
        decided: which layers, and their patterns.
        metadata: what else the file shall say.

    Returns:
        Dense and packed bytes of each packed weight, by layer.

    Raises:
        PackError: if raw parameters are all that is sparse, or a weight is not of its pattern.
        CheckpointError: if the disk refuses.
    """
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
    save_packed(out, weights, tensors=rest, metadata=metadata)
    return sizes


def unpacked_state(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict of a packed file, exact zeros and all.

    Raises:
        PackedFileError: if the file is no packed file, damaged, or of another version.
    """
    return dense_state(*load_packed(path))


def dense_state(
    packed: Mapping[str, PackedWeight], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One state dict of what :func:`load_packed` returns.

    Args:
        packed: by layer; each comes back in its weight's shape ``(O, C / groups, *kernel)``.
        tensors: the others, by key.
    """
    return {**tensors, **{f"{name}.weight": unpack_weight(each) for name, each in packed.items()}}
