# SPDX-License-Identifier: Apache-2.0
"""Packed weights on disk: one safetensors file, versioned, check-summed, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from spikenm_fx.checkpoint import PACKED_FORMAT as FORMAT
from spikenm_fx.checkpoint import load_metadata, write_atomically
from spikenm_fx.errors import PackedFileError, SpikeNMError
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight
from spikenm_fx.pattern import NM

__all__ = ["FORMAT", "VERSION", "is_packed", "load_packed", "packed_bytes", "save_packed"]

VERSION = "1"
MEANING = "values kept per block of consecutive input channels, zeros included"

_PARTS = ("values", "indices", "scale")


def save_packed(
    path: str | os.PathLike[str],
    weights: Mapping[str, PackedWeight],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write packed weights, and any further tensors beside them, to one safetensors file.

    The file appears under its name only when it is complete: a failure leaves an older file as it
    was.

    Args:
        path: of the file.
        weights: packed weights by qualified layer name.
        tensors: anything else that belongs to the model (biases, norms), by state-dict key.
        metadata: what else the file shall say; the checksum covers it.

    Raises:
        PackError: if a weight is not valid.
        PackedFileError: if a weight is no :class:`PackedWeight`, if ``tensors`` holds anything but
            dense tensors that safetensors can store, or a name in it is one that a packed layer
            has taken: ``<layer>.weight``, or the name of a part of it.
        CheckpointError: if the disk refuses.
    """
    content = packed_bytes(weights, tensors=tensors, metadata=metadata)
    write_atomically(Path(path), lambda part: part.write_bytes(content))


def packed_bytes(
    weights: Mapping[str, PackedWeight],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The content of the file that :func:`save_packed` writes.

    Args:
        weights: packed weights by qualified layer name.
        tensors: anything else, of any shape, by name.
        metadata: what else the file says of itself.

    Raises:
        PackError: if a weight is not valid.
        PackedFileError: as :func:`save_packed`.
    """
    flat: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, packed in weights.items():
        if not isinstance(packed, PackedWeight):
            raise PackedFileError(
                f"{name} is a {type(packed).__name__}; a PackedWeight is required: pack_weight()"
            )
        packed.check(name)
        layers[name] = _describe(packed)
        for part in _PARTS:
            tensor = getattr(packed, part)
            if tensor is not None:
                flat[f"{name}::{part}"] = tensor.detach().cpu().contiguous()
    for key, tensor in (tensors or {}).items():
        _refuse(key, tensor, weights)
        flat[key] = tensor.detach().cpu().contiguous().clone()
    said = {
        **(metadata or {}),
        "format": FORMAT,
        "version": VERSION,
        "meaning": MEANING,
        "axis": "input channels, in fold order (out, kernel, channels)",
        "layers": json.dumps(layers, sort_keys=True),
    }
    said["checksum"] = _checksum(said, flat)
    try:
        return save(flat, said)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in flat.values()}))
        raise PackedFileError(
            f"safetensors cannot hold these tensors ({dtypes}): {type(error).__name__}: {error}"
        ) from error


def _refuse(key: object, tensor: object, weights: Mapping[str, PackedWeight]) -> None:
    """Raise for what could not be read back as it was meant."""
    if not isinstance(key, str) or key == "__metadata__":
        raise PackedFileError(f"a tensor cannot be named {key!r} in a safetensors file")
    if not isinstance(tensor, Tensor):
        raise PackedFileError(f"{key} is a {type(tensor).__name__}; only tensors can be saved")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise PackedFileError(
            f"{key} {tuple(tensor.shape)} has layout {tensor.layout} on {tensor.device}; dense "
            "tensors with data can be saved: call to_dense() on a sparse one"
        )
    layer, separator, part = key.rpartition("::")
    if separator and part in _PARTS and layer in weights:
        raise PackedFileError(f"tensor {key!r} has the name of a part of a packed weight")
    if any(key == (f"{name}.weight" if name else "weight") for name in weights):
        raise PackedFileError(
            f"tensor {key!r} is the weight of a layer that is packed already; leave it out"
        )


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file calls itself packed; whether it is sound, loading tells."""
    return load_metadata(Path(path)).get("format") == FORMAT


def load_packed(
    path: str | os.PathLike[str],
) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """Read what :func:`save_packed` wrote: packed weights and the further tensors.

    Raises:
        PackedFileError: if the file is no packed file, of another version, does not match its
            checksum, or describes no layers that can be.
        FileNotFoundError: if it is missing.
    """
    path = Path(path)
    metadata, flat = _read(path)
    if metadata.get("format") != FORMAT:
        raise PackedFileError(f"{path} is not a packed file: its format is not {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise PackedFileError(
            f"{path} is of packed-format version {metadata.get('version')!r}; this release reads "
            f"version {VERSION!r}: pack the model again"
        )
    if metadata.get("checksum") != _checksum(metadata, flat):
        raise PackedFileError(
            f"{path} does not match its checksum: it was changed or damaged after it was written; "
            "pack the model again"
        )
    try:
        layers = json.loads(metadata["layers"])
        if not isinstance(layers, dict):
            raise TypeError(f"layers is a {type(layers).__name__}; an object by name is required")
        weights = {name: _assemble(about, name, flat) for name, about in layers.items()}
    except KeyError as error:
        raise PackedFileError(f"{path} is not a valid packed file: it lacks {error}") from error
    except (TypeError, ValueError, OverflowError, RecursionError, SpikeNMError) as error:
        raise PackedFileError(f"{path} is not a valid packed file: {error}") from error
    return weights, flat


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            return metadata, {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise PackedFileError(f"{path} is not a readable safetensors file: {error}") from error


def _describe(packed: PackedWeight) -> dict[str, Any]:
    geometry = packed.geometry
    return {
        "pattern": str(packed.nm),
        "shape": list(packed.shape),
        "kind": geometry.kind,
        "stride": list(geometry.stride),
        "padding": list(geometry.padding),
        "dilation": list(geometry.dilation),
        "groups": geometry.groups,
        "dtype": str(packed.values.dtype).removeprefix("torch."),
        "index_bits": packed.index_bits,
    }


def _assemble(about: Any, name: str, flat: dict[str, Tensor]) -> PackedWeight:
    if not isinstance(about, dict):
        raise TypeError(f"{name} is described by a {type(about).__name__}; an object is required")
    stride, padding, dilation = (
        _integers(about[key], f"{name}: {key}") for key in ("stride", "padding", "dilation")
    )
    (groups,) = _integers([about["groups"]], f"{name}: groups")
    geometry = LayerGeometry(about["kind"], stride, padding, dilation, groups)
    packed = PackedWeight(
        NM.parse(about["pattern"]),
        _integers(about["shape"], f"{name}: shape"),
        geometry,
        flat.pop(f"{name}::values"),
        flat.pop(f"{name}::indices"),
        flat.pop(f"{name}::scale", None),
    )
    packed.check(name)
    return packed


def _integers(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(v) is not int for v in value):  # bool is an int
        raise TypeError(f"{what} is {value!r}; integers are required")
    return tuple(value)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata (but the checksums) and every tensor's name, type and bytes."""
    digest = hashlib.sha256()
    plain = {k: v for k, v in metadata.items() if k not in ("checksum", "digest")}
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
