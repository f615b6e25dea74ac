# SPDX-License-Identifier: Apache-2.0
"""Count the blocks of an ONNX file's weights, along the axis that each product sums over.

Exporters transpose and rename weights: what counts is how the graph uses them.  A convolution
sums over axis 1 of its weight, a transposed one over axis 0, Gemm over axis 1 where ``transB`` is
set and else over axis 0, MatMul over the last but one axis of its second factor.  Transposes and
casts on the way are followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikenm_fx.errors import CheckpointError
from spikenm_fx.export.onnx_export import METADATA
from spikenm_fx.export.packages import needed
from spikenm_fx.pack.check.stored import promised_layer, verify_stored
from spikenm_fx.plan.decide import LayerPlan
from spikenm_fx.verify import Verification

__all__ = ["onnx_weights", "verify_onnx"]


def verify_onnx(
    file: str | Path, nm: str | None = None, without: Sequence[str] = ()
) -> Verification:
    """Count the blocks of an ONNX file.

    Args:
        file: of this library or anybody's.
        nm: required of every weight whose input channels it divides; None: what the file's
            metadata promises, else nothing.
        without: weights of which nothing is required.

    Raises:
        ExportError: if the onnx package is missing.
        CheckpointError: if the file cannot be read.
        PlanError: if ``without`` names no weight, or ``nm`` divides none.
    """
    package = needed("onnx", "verifying an ONNX file")
    try:
        proto = package.load(str(file))
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read as ONNX: {error}") from error
    state = onnx_weights(proto)
    if not state:
        raise CheckpointError(
            f"{file}: no Conv, Gemm or MatMul in it has a stored weight; quantised operators are "
            "not followed, verify the model before it was quantised"
        )
    return verify_stored(str(file), state, _promised(file, proto, state), nm, without)


def onnx_weights(proto: Any) -> dict[str, Tensor]:
    """The weights of all products, with the axis that is summed over as axis 1.

    Args:
        proto: an ``onnx.ModelProto`` with its data.

    Returns:
        ``(O, C, ...)`` under the weight's name, which ends in ``.weight``.
    """
    package = needed("onnx", "verifying an ONNX file")
    stored = {i.name: i for i in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    found: dict[str, Tensor] = {}
    for node in proto.graph.node:
        place = _place(package, node)
        if place is None:
            continue
        name, tensor = _follow(package, node.input[1], stored, makers)
        if tensor is None or tensor.dim() < 2:
            continue
        key = name if name.endswith("weight") else f"{name}.weight"
        found.setdefault(key, tensor.movedim(place, 1) if place >= 0 else tensor.mT)
    return found


def _place(package: Any, node: Any) -> int | None:
    """Axis of the second input that is summed over; -1: the last but one; None: no product."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "ConvTranspose":
        return 0
    if node.op_type == "Gemm":
        given = {a.name: package.helper.get_attribute_value(a) for a in node.attribute}
        return 1 if given.get("transB") else -1
    return -1 if node.op_type == "MatMul" else None


def _follow(
    package: Any, name: str, stored: dict[str, Any], makers: dict[str, Any]
) -> tuple[str, Tensor | None]:
    """The stored tensor behind a name, as the product sees it."""
    if name in stored:
        array = package.numpy_helper.to_array(stored[name])
        return name, torch.from_numpy(array.copy())
    maker = makers.get(name)
    if maker is None:
        return name, None
    if maker.op_type == "Constant":
        value = next((a.t for a in maker.attribute if a.name == "value"), None)
        array = None if value is None else package.numpy_helper.to_array(value)
        return name, None if array is None else torch.from_numpy(array.copy())
    if maker.op_type == "Transpose":
        behind, tensor = _follow(package, maker.input[0], stored, makers)
        order = next((list(a.ints) for a in maker.attribute if a.name == "perm"), None)
        if tensor is None:
            return behind, None
        return behind, tensor.permute(order or list(range(tensor.dim()))[::-1])
    if maker.op_type in ("Identity", "Cast"):
        return _follow(package, maker.input[0], stored, makers)
    return name, None


def _promised(file: str | Path, proto: Any, state: dict[str, Tensor]) -> list[LayerPlan]:
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        entries = json.loads(metadata.get(METADATA, "{}"))
        return list(_layers(entries, state))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: its metadata {METADATA!r} is damaged: {error}") from error


def _layers(entries: Any, state: dict[str, Tensor]) -> Iterator[LayerPlan]:
    for name, entry in entries.items():
        if name not in state:
            raise KeyError(f"no product uses {name}")
        yield promised_layer(name.removesuffix(".weight"), entry["pattern"])
