# SPDX-License-Identifier: Apache-2.0
"""Whether a model may be exported as it stands; everything else is refused in one sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import ExportError, PackError, no_module, some_of
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.pack.copying import copy_at_rest
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.trace import find_neurons

__all__ = ["arguments", "at_rest", "refuse_unready"]


def refuse_unready(model: nn.Module, verb: str, *, dtypes: tuple[torch.dtype, ...]) -> None:
    """Let through a folded model at rest, its weights finite and of one of ``dtypes``.

    Args:
        model: what is to be exported; it is not changed.
        verb: the function's name, for the message.
        dtypes: that the target can hold.

    Raises:
        ExportError: for anything else, with what to do about it.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(no_module(verb, model))
    masked = [name for name, _, _ in masked_weights(model)]
    if masked:
        raise ExportError(
            f"{verb}: {some_of(masked)} still carry masks, which no other program knows; "
            "call spikenm_fx.fold(model) first"
        )
    for name, module in nn.Module.named_modules(model):
        if isinstance(module, PackedLayer):
            raise ExportError(
                f"{verb}: {name or 'the model'} is packed; export the folded model that this "
                "engine was made of"
            )
    for name, parameter in nn.Module.named_parameters(model):
        if parameter.is_floating_point() and parameter.dtype not in dtypes:
            held = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ExportError(
                f"{verb}: {name} {tuple(parameter.shape)} is "
                f"{str(parameter.dtype).removeprefix('torch.')}, which the readers do not compute "
                f"in; it takes {held}: call model.to(torch.{held.split(', ')[0]}) first"
            )
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ExportError(
                f"{verb}: {name} {tuple(parameter.shape)} holds NaN or infinity; load or train "
                "finite weights first"
            )
    _refuse_running(model, verb)


def _refuse_running(model: nn.Module, verb: str) -> None:
    """A membrane that is not at rest would be frozen into what is written."""
    for name, spec in find_neurons(model).items():
        if not getattr(model.get_submodule(name), "init_hidden", True):
            continue  # snnTorch: the caller hands the state in, what is left there is not read
        for part in nn.Module.modules(model.get_submodule(name)):
            held = _held(part)
            for key in {*spec.state, "v", "mem", "syn"} & held.keys():
                value = held[key]
                if isinstance(value, Tensor) and bool((value != spec.initial).any()):
                    raise ExportError(
                        f"{verb}: {name}.{key} is not at rest, the model is in the middle of a "
                        "sequence; reset it first (SpikingJelly functional.reset_net(model), "
                        "snnTorch utils.reset(model), sinabs reset_states(model))"
                    )


def _held(module: nn.Module) -> dict[str, Any]:
    """State by its name: attributes, buffers and SpikingJelly's memories."""
    memories = vars(module).get("_memories")
    named = memories if isinstance(memories, dict) else {}
    held: dict[str, Any] = {**vars(module), **module._buffers, **named}
    return held


def at_rest(model: nn.Module, verb: str) -> nn.Module:
    """A copy in eval mode at rest, to run and to take apart.

    Raises:
        ExportError: for a model that cannot be copied.
    """
    try:
        return copy_at_rest(model)
    except PackError as error:
        raise ExportError(f"{verb}: {error}".replace("; pack works", "; it works")) from error


def arguments(x: Any, verb: str) -> Tensor:
    """The one example tensor.

    Args:
        x: ``[T, N, ...]``, ``[N, T, ...]`` or ``[N, ...]``, as the model takes it.
        verb: the function's name, for the message.

    Raises:
        ExportError: if it is anything but a finite floating-point tensor with a fixed shape.
    """
    if isinstance(x, tuple) and len(x) == 1:
        x = x[0]
    if not isinstance(x, Tensor):
        raise ExportError(
            f"{verb}: the example input is a {type(x).__name__}; give one tensor of fixed batch "
            "size and number of steps: files hold one shape, export once for each"
        )
    if x.dtype != torch.float32:
        raise ExportError(
            f"{verb}: the example input is {str(x.dtype).removeprefix('torch.')}; give it as "
            "float32 (x.float())"
        )
    if not x.numel() or not bool(x.isfinite().all()):
        raise ExportError(
            f"{verb}: the example input of shape {tuple(x.shape)} is empty or not finite; give "
            "inputs as the model sees them, at which its neurons fire"
        )
    return x
