# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of anybody: read tensors only, never code; write completely or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spikenm_fx.errors import CheckpointError, near_misses, some_of

__all__ = [
    "load_into",
    "load_metadata",
    "load_state",
    "load_tensor",
    "save_state",
    "write_atomically",
]

WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "params")
"""Keys under which training scripts keep the state dict, tried in this order."""

PREFIXES = ("module.", "_orig_mod.", "module.")
"""What DataParallel and torch.compile put before every key, in either order."""

PACKED_FORMAT = "spikenm_fx.packed"
"""What the metadata of a packed file calls it."""

_SHOWN = 5


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, on the CPU.

    Reads safetensors, and torch files with ``weights_only=True``: no code in them ever runs.  A
    wrapping (``{"state_dict": ..., "optimizer": ...}``) and the prefixes of DataParallel and
    torch.compile are taken off.

    Raises:
        CheckpointError: if the file is missing, truncated, packed, holds code, holds no tensors, or
            several state dicts under names that do not tell which one is meant.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    state = _tensors(_unwrap(_read(path), path))
    if not state:
        raise CheckpointError(
            f"{path}: holds no tensors by name; a state dict ({{key: tensor}}) is required, "
            f"possibly under one of {', '.join(WRAPPERS)}"
        )
    if load_metadata(path).get("format") == PACKED_FORMAT:
        raise CheckpointError(
            f"{path}: is packed: its weights are kept values and indices, for running and for "
            "verify; give the checkpoint that it was packed from, or unpack it:\n"
            "  from spikenm_fx.pack import unpacked_state\n"
            f"  save_state('dense.safetensors', unpacked_state({str(path)!r}))"
        )
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for other and unreadable files."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def load_tensor(path: str | Path) -> Tensor:
    """One batch out of ``.npy``, ``.pt`` or ``.safetensors``; no code in them ever runs.

    Returns:
        Of the file's shape; float32 where a ``.npy`` holds real numbers.

    Raises:
        CheckpointError: if it cannot be read, or holds several tensors, complex numbers, NaN or
            infinity.
    """
    path = Path(path)
    tensor = _read_npy(path) if path.suffix == ".npy" else _only_tensor(path)
    if tensor.is_complex():
        raise CheckpointError(f"{path}: holds complex numbers; a batch of real values is needed")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: holds NaN or infinity; a batch of finite values is needed")
    return tensor


def _read_npy(path: Path) -> Tensor:
    import numpy as np

    try:
        found = torch.from_numpy(np.load(path, allow_pickle=False))
        return found if found.is_complex() else found.float()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise CheckpointError(f"{path}: not an array of numbers: {error}") from error


def _only_tensor(path: Path) -> Tensor:
    tensors = load_state(path)
    if len(tensors) != 1:
        raise CheckpointError(f"{path}: holds {len(tensors)} tensors; one batch is required")
    return next(iter(tensors.values()))


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a complete safetensors file: {error}; was the copy cut short?"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise CheckpointError(f"{path}: not a torch checkpoint: {error}") from error
        raise CheckpointError(
            f"{path}: holds Python objects, which loading would run as code; only tensors are "
            "read.  Save the state dict alone, where you trust the file:\n"
            "  torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')\n"
            f"  ({_first_line(error)})"
        ) from error
    except Exception as error:  # arbitrary bytes make torch's reader raise nearly anything
        raise CheckpointError(
            f"{path}: not a complete torch checkpoint ({type(error).__name__}: "
            f"{_first_line(error)}); was the copy cut short, or is it another kind of file?"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unwrap(data: Any, path: Path) -> Any:
    """The state dict in what a training script saved; state dicts themselves hold none inside."""
    if not isinstance(data, Mapping):
        return data
    inner = {key: value for key, value in data.items() if _tensors(value)}
    for key in WRAPPERS:
        if key in inner:
            return inner[key]
    if len(inner) > 1:
        raise CheckpointError(
            f"{path}: holds several state dicts, {some_of(map(repr, inner))}; save the one that is "
            "meant by itself, or under the key 'state_dict'"
        )
    return next(iter(inner.values()), data)


def _tensors(data: Any) -> dict[str, Tensor]:
    if not isinstance(data, Mapping):
        return {}
    return {str(key): value for key, value in data.items() if isinstance(value, Tensor)}


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, source: str = "checkpoint") -> None:
    """Load ``state`` strictly; nothing is copied unless all of it fits.

    Three kinds of keys may differ: a prefix before all of them (``model.``) is taken off, masks in
    the file of a model that has none are left out, as its weights are masked already, and masks of
    the model that the file does not have start from its weights.

    Args:
        model: a dense, sparse or folded model.
        state: tensors by key, each of its parameter's or buffer's shape.
        source: what to call ``state`` in messages.

    Raises:
        CheckpointError: listing missing, foreign (with near misses) and misshapen keys at once.
    """
    own = model.state_dict()
    state = _without_prefix(state, own)
    if not _masks(own):
        masks = _masks(state)
        state = {key: value for key, value in state.items() if key not in masks or key in own}
    elif not _masks(state):
        masks = _masks(own)
        own = {key: value for key, value in own.items() if key not in masks}
    missing = [key for key in own if key not in state]
    foreign = [key for key in state if key not in own]
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or foreign or shapes:
        near = {key: near_misses(key, missing) for key in foreign[:_SHOWN]}
        foreign = [f"{k} (near: {near[k]})" if near.get(k) else k for k in foreign]
        parts = [
            _listed("missing in the file", missing),
            _listed("in the file but not in the model", foreign),
            _listed("of another shape", shapes),
        ]
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}:\n" + "\n".join(filter(None, parts))
        )
    model.load_state_dict(dict(state))


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` without what stands before all of its keys, if ``own`` has them without it."""
    first = next(iter(state), "")
    for dots in range(1, first.count(".") + 1):
        prefix = ".".join(first.split(".")[:dots]) + "."
        if not all(key.startswith(prefix) and key not in own for key in state):
            break
        if any(key.removeprefix(prefix) in own for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _masks(state: Mapping[str, Tensor]) -> set[str]:
    """Keys of what a sparse checkpoint holds beside its weights: ``w_nm`` and others of ``w_``."""
    weights = [key.removesuffix("_nm") for key in state if key.endswith("_nm")]
    own = [f"{weight}_" for weight in weights if weight in state]
    return {key for key in state if any(key.startswith(start) for start in own)}


def _listed(title: str, keys: list[str]) -> str:
    if not keys:
        return ""
    shown = "\n    ".join(keys[:_SHOWN])
    more = f"\n    ... {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"  {len(keys)} {title}:\n    {shown}{more}"


def save_state(
    path: str | Path, state: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict: safetensors by suffix, else a torch file; complete or not at all.

    Args:
        path: ``.safetensors`` decides the format.
        state: tensors of any shapes by key; views and shared memory are written out.
        metadata: of a safetensors file; a torch file has none.

    Raises:
        CheckpointError: if the disk refuses; an older file of that name is then as it was.
    """
    path = Path(path)
    # safetensors refuses shared storage and views: every tensor gets memory of its own.
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    if path.suffix == ".safetensors":
        write_atomically(path, lambda part: save_file(plain, part, metadata=dict(metadata or {})))
    else:
        write_atomically(path, lambda part: torch.save(plain, part))


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then give it the name in one step.

    A link stays a link: the file that it names is replaced.

    Raises:
        CheckpointError: if writing fails (disk full, no permission), or ``path`` is no file (a
            folder, a device); nothing half-written stays.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise CheckpointError(f"{path}: is {kind}, which a file would replace; name a file")
    part: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        part = Path(name)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{path}: could not be written: {reason}; nothing was changed there"
        ) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
