# SPDX-License-Identifier: Apache-2.0
"""A copy of a model to run and to change, at rest; the model itself is not touched."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.state import advice_if_sharded, deepcopied, reset_to_rest
from spikenm_fx.trace import find_neurons

__all__ = ["copy_at_rest", "own_memory", "shared_weights", "unregister"]

_DEPTH = 5
_LARGE = 2**18  # numbers of a weight from which on sharing it is worth while


def copy_at_rest(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A copy in eval mode without gradients, its neurons reset.

    State that hangs on an autograd graph, as right after training, is copied detached.

    Args:
        model: any model.
        share: large weights of layers use the model's memory, until :func:`own_memory`.

    Raises:
        PackError: for a model that cannot be copied.
    """
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    for module in nn.Module.modules(model):
        for tensor in _tensors_in(vars(module), _DEPTH, seen):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    if share:
        for module in nn.Module.modules(model):
            weight = module._parameters.get("weight") if is_weight_layer(module) else None
            if type(weight) is nn.Parameter and weight.numel() >= _LARGE:
                memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    try:
        copied = deepcopied(model, memo).eval().requires_grad_(False)
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        raise PackError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pack "
            "works on a copy.deepcopy of the model: make that work, or remove what prevents it."
            + advice_if_sharded(model)
        ) from error
    _register(model, copied)
    with torch.no_grad():
        for name in find_neurons(copied):
            _reset(copied.get_submodule(name))
    return copied


def shared_weights(copied: nn.Module, model: nn.Module) -> list[nn.Parameter]:
    """Parameters of a copy that use the memory of the model."""
    held = {p.data_ptr() for p in nn.Module.parameters(model) if p.numel()}
    return [p for p in nn.Module.parameters(copied) if p.numel() and p.data_ptr() in held]


def own_memory(copied: nn.Module, model: nn.Module) -> None:
    """Give a copy memory of its own for what it shares with the model."""
    for parameter in shared_weights(copied, model):
        parameter.data = parameter.data.clone()


def unregister(copied: nn.Module) -> None:
    """Take a copy that is not needed any more off the lists that its classes keep."""
    for module in copied.modules():
        listed = getattr(type(module), "instances", None)
        if isinstance(listed, list):
            listed[:] = [entry for entry in listed if entry is not module]


def _reset(neuron: nn.Module) -> None:
    """To rest, unless its reset is none: it raises, or it writes into parameters."""
    before = {name: p.detach().clone() for name, p in neuron.named_parameters()}
    try:
        reset_to_rest(neuron)
    except Exception:  # a reset that wants the network around it: the state stays as it was
        return
    for name, parameter in neuron.named_parameters():
        if name in before and before[name].shape == parameter.shape:
            parameter.data.copy_(before[name])


def _register(model: nn.Module, copied: nn.Module) -> None:
    """Enter copies where their originals are listed: snnTorch resets the neurons of such a list."""
    for original, twin in zip(model.modules(), copied.modules(), strict=True):
        listed = getattr(type(original), "instances", None)
        if isinstance(listed, list) and any(entry is original for entry in listed):
            listed.append(twin)


def _tensors_in(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in containers and plain objects, those that hooks are bound to included."""
    if isinstance(value, Tensor):
        yield value
        return
    if depth < 0 or id(value) in seen or isinstance(value, type | types.ModuleType | nn.Module):
        return
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set | deque):
        inner = list(value)
    elif isinstance(value, types.MethodType):
        inner = [value.__self__]
    elif isinstance(value, functools.partial):
        inner = [*value.args, *value.keywords.values()]
    elif isinstance(getattr(value, "__dict__", None), dict):
        inner = list(vars(value).values())
    if inner:
        seen.add(id(value))
    for item in inner:
        yield from _tensors_in(item, depth - 1, seen)
