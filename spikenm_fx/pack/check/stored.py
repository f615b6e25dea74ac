# SPDX-License-Identifier: Apache-2.0
"""Stored weights: what a file promises, or somebody asks of it, counted block by block.

Nothing relies on the order of keys: safetensors files are sorted by name, and the first and last
layer of a model are somewhere among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from spikenm_fx.checkpoint import load_metadata, load_state
from spikenm_fx.errors import CheckpointError, PlanError, did_you_mean
from spikenm_fx.pack.weights.files import is_packed, load_packed
from spikenm_fx.pack.weights.models import dense_state
from spikenm_fx.pattern import NM
from spikenm_fx.plan.decide import LayerPlan
from spikenm_fx.plan.plan import Plan
from spikenm_fx.plan.weights import RAW
from spikenm_fx.verify import Verification, verify

__all__ = ["promised_layer", "sparse_metadata", "verify_file", "verify_stored"]

_KEY = "spikenm_fx.layers"
_RAW_KEY = "spikenm_fx.parameters"


def sparse_metadata(decided: Plan) -> dict[str, str]:
    """What a checkpoint says of its zeros, so that it can be verified without the model."""
    layers = {layer.name: str(layer.nm) for layer in decided.sparse if layer.kind != RAW}
    raw = [
        {"name": entry.name, "nm": str(entry.nm), "axis": entry.axis, "groups": entry.groups}
        for entry in decided.sparse
        if entry.kind == RAW
    ]
    promised = {_KEY: json.dumps(layers), "axis": "input channels", "n": "kept"}
    return promised | ({_RAW_KEY: json.dumps(raw)} if raw else {})


def verify_file(file: Path, nm: str | None = None, without: Sequence[str] = ()) -> Verification:
    """Count the blocks of a checkpoint or of a packed file.

    Args:
        file: ours or anybody's.
        nm: required of every weight whose input channels it divides; None: what the file promises
            (packed, or written by ``sparsify``), else nothing.
        without: layers of which nothing is required.

    Raises:
        CheckpointError: if the file cannot be read.
        PlanError: if ``without`` names no weight, or ``nm`` divides none.
    """
    if is_packed(file):
        packed, tensors = load_packed(file)
        state = dense_state(packed, tensors)
        promised = [promised_layer(name, str(each.nm)) for name, each in packed.items()]
    else:
        state, promised = load_state(file), _promised(file)
    return verify_stored(str(file), state, promised, nm, without)


def verify_stored(
    source: str,
    state: Mapping[str, Tensor],
    promised: Sequence[LayerPlan],
    nm: str | None = None,
    without: Sequence[str] = (),
) -> Verification:
    """Count the blocks of weights that some file held.

    Args:
        source: the file's name.
        state: weights ``(O, C, ...)`` under keys ``...weight``.
        promised: what the file says of them.
        nm: as for :func:`verify_file`.
        without: as for :func:`verify_file`.

    Raises:
        PlanError: if ``without`` names no weight, or ``nm`` divides none.
    """
    names = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    names += [entry.name for entry in promised if entry.kind == RAW]
    for name in without:
        if name not in names:
            raise PlanError(f"no weight of {source} is named {name!r}{did_you_mean(name, names)}")
    required = _asked(state, nm) if nm is not None else promised
    required = [entry for entry in required if entry.name not in without]
    return verify(state, Plan(source, tuple(required)) if required else None)


def _promised(file: Path) -> list[LayerPlan]:
    metadata = load_metadata(file)
    try:
        layers = json.loads(metadata.get(_KEY, "{}"))
        found = [promised_layer(str(name), pattern) for name, pattern in layers.items()]
        for raw in json.loads(metadata.get(_RAW_KEY, "[]")):
            entry = promised_layer(str(raw["name"]), raw["nm"], RAW)
            found.append(replace(entry, axis=int(raw["axis"]), groups=int(raw["groups"])))
        return found
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: its metadata {_KEY!r} is damaged: {error}") from error


def promised_layer(name: str, pattern: str, kind: str = "layer") -> LayerPlan:
    """What a file says of a weight: that it is N:M.

    Args:
        name: of the layer, or of a raw parameter.
        pattern: ``"n:m"``.
        kind: ``"layer"``, or that of a raw parameter.
    """
    return LayerPlan(name, kind, (), "sparsify", NM.parse(pattern), False, "promised by the file")


def _asked(state: Mapping[str, Tensor], nm: str) -> list[LayerPlan]:
    pattern = NM.parse(nm)
    fitting = [
        key.removesuffix(".weight")
        for key, tensor in state.items()
        if key.endswith(".weight") and tensor.dim() > 1 and tensor.shape[1] % pattern.of == 0
    ]
    if not fitting:
        raise PlanError(f"no weight has input channels in multiples of {pattern.of}")
    return [promised_layer(name, nm) for name in fitting]
