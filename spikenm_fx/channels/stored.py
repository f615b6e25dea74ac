# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of models whose channels were removed, which say how a model is cut to fit them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from spikenm_fx._torch import ConvNd
from spikenm_fx.channels.cut import match_sizes, undoable
from spikenm_fx.channels.left_alone import named_tensors
from spikenm_fx.checkpoint import load_into, load_metadata, load_state, save_state
from spikenm_fx.errors import CheckpointError

__all__ = ["is_smaller", "load_smaller", "refuse_suffix", "save_smaller", "smaller_metadata"]

_KEY = "spikenm_fx.removed"
"""In the file's metadata: the groups of grouped convolutions, which no shape tells."""


def is_smaller(file: str | Path) -> bool:
    """Whether the file says that channels were removed; False for files that cannot be read."""
    return _KEY in load_metadata(file)


def refuse_suffix(file: str | Path) -> None:
    """Let through names that :func:`save_smaller` can write.

    Raises:
        CheckpointError: if it is no ``.safetensors``.
    """
    if Path(file).suffix != ".safetensors":
        raise CheckpointError(
            f"{file}: a model without some of its channels is stored as .safetensors, whose "
            "metadata says how a model is cut to fit it; give it that suffix"
        )


def save_smaller(
    file: str | Path, model: nn.Module, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the state dict of a model whose channels were removed; :func:`load_smaller` reads it.

    Args:
        file: ``.safetensors``; written completely or not at all.
        model: after :func:`~spikenm_fx.channels.remove_dead_channels` or
            :func:`~spikenm_fx.channels.remove_channels`.
        metadata: what else the file shall say.

    Raises:
        CheckpointError: if the suffix is another one, or the disk refuses.
    """
    refuse_suffix(file)
    save_state(file, model.state_dict(), metadata={**(metadata or {}), **smaller_metadata(model)})


def smaller_metadata(model: nn.Module) -> dict[str, str]:
    """What a file must say beside the tensors for :func:`load_smaller`, packed files too.

    Args:
        model: some of whose channels were removed.
    """
    groups = {
        name: module.groups
        for name, module in nn.Module.named_modules(model)
        if isinstance(module, ConvNd) and module.groups > 1
    }
    return {_KEY: json.dumps({"groups": groups})}


def load_smaller(
    model: nn.Module,
    file: str | Path,
    *,
    read: Callable[[str | Path], Mapping[str, Tensor]] = load_state,
) -> None:
    """Cut ``model``, built as it was at first, to the file's channels, and load its weights.

    All or nothing: where the file does not fit, the model is as it was.

    Args:
        model: dense, with all of its channels.
        file: written by :func:`save_smaller`, or packed with :func:`smaller_metadata`.
        read: its dense state dict, each tensor of its parameter's shape;
            :func:`spikenm_fx.pack.unpacked_state` for packed files.

    Raises:
        CheckpointError: if the file cannot be read, was not written so, or is of another model.
    """
    state, groups = read(file), _groups(file)
    with undoable(model):
        for name, module in nn.Module.named_modules(model):
            prefix = f"{name}." if name else ""
            if isinstance(module, ConvNd):
                module.groups = groups.get(name, 1)
            _cut_to(module, {k.removeprefix(prefix): v for k, v in state.items()})
        load_into(model, state, source=str(file))


def _groups(file: str | Path) -> dict[str, int]:
    """Groups of the convolutions that have more than one, by layer."""
    text = load_metadata(file).get(_KEY)
    if text is None:
        raise CheckpointError(
            f"{file}: does not say that channels were removed; only what save_smaller() wrote "
            "tells how a model is cut to fit it"
        )
    try:
        groups = {str(name): int(n) for name, n in json.loads(text)["groups"].items()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: its metadata {_KEY!r} is damaged: {error}") from error
    if any(n < 2 for n in groups.values()):
        raise CheckpointError(f"{file}: its metadata {_KEY!r} is damaged: groups {groups}")
    return groups


def _cut_to(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Shorten the module's own tensors to those of ``state``; a bias may have come into being."""
    own = named_tensors(module)
    for key, tensor in own.items():
        wanted = state.get(key)
        if "." in key or wanted is None or wanted.dim() != tensor.dim():
            continue
        if all(n <= m for n, m in zip(wanted.shape, tensor.shape, strict=True)):
            tensor.data = tensor.data[tuple(map(slice, wanted.shape))].contiguous()
    if "bias" in state and isinstance(module, nn.Linear | ConvNd) and module.bias is None:
        module.bias = nn.Parameter(module.weight.new_zeros(state["bias"].shape))
    match_sizes(module)
