# SPDX-License-Identifier: Apache-2.0
"""Put a model back exactly as it was: parameters, buffers, neuron state, flags, grads, RNG."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikenm_fx._torch import global_hooks, is_scripted
from spikenm_fx.state.guard import Watched, watching

__all__ = ["detach_state", "preserved", "preserved_records"]

_DEPTH = 4
"""How deep state may lie in lists, dicts and plain objects of a module."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def preserved(
    model: nn.Module, *, guarded: bool = True, at_once: int = 0, leave: Iterable[Tensor] = ()
) -> Iterator[Callable[[], None]]:
    """Restore ``model`` and the random generators on leaving, whatever happened inside.

    Modules of other models that a forward of this one may reset are restored as well: snnTorch's
    ``utils.reset`` takes all of its class.

    Tensors keep their identity and, unless the block wrote into them, their version; containers
    keep theirs.  Buffers and state are copied for the time of the block, parameters and their
    gradients only when something is about to write into them.

    Args:
        model: any model.
        guarded: look out for writes into parameters, which costs tens of microseconds for each
            operation; without, what is written into them stays, and times can be measured.
        at_once: where parameters and gradients take no more bytes than this, copy them instead.
        leave: buffers of any shape that nothing writes into, of which no copies are made.

    Yields:
        A function that restores at once, for another try inside the block.
    """
    undo = _Undo()
    undo.leave(list(leave))
    with torch.no_grad():
        for module in nn.Module.modules(model):
            undo.remember(module, _DEPTH)
        undo.watches_all = guarded  # such a list may hold all that a process has ever made
        for module in _listed_beside(model):
            undo.remember(module, _DEPTH)
        watched = undo.watched if guarded and not undo.copied(at_once) else ()
    restore_rng = _remember_rng()

    def restore() -> None:
        with torch.no_grad():
            undo.restore()
        restore_rng()

    try:
        with watching(watched):
            yield restore
    finally:
        restore()


def _listed_beside(model: nn.Module) -> list[nn.Module]:
    """Modules outside of ``model`` on the lists of instances that its classes keep."""
    modules = set(nn.Module.modules(model))
    lists = [getattr(type(module), "instances", None) for module in modules]
    listed = {id(m): m for held in lists if isinstance(held, list) for m in held}
    return [m for m in listed.values() if isinstance(m, nn.Module) and m not in modules]


@contextlib.contextmanager
def preserved_records(*models: nn.Module) -> Iterator[None]:
    """On leaving, what the hooks of ``models`` have recorded inside is gone again.

    Monitors keep what they see in lists that their hooks close over, outside of any module.  The
    modules themselves are left as the block leaves them.
    """
    undo = _Undo()
    modules = [module for model in models for module in nn.Module.modules(model)]
    undo.leave([*modules, *(p for m in modules for p in m._parameters.values() if p is not None)])
    own = (hooks for m in modules for kind, hooks in vars(m).items() if kind in _HOOKS)
    with torch.no_grad():
        for hook in [*global_hooks(), *(hook for hooks in own for hook in hooks.values())]:
            for value in _enclosed(hook):
                undo.remember(value, _DEPTH)
    try:
        yield
    finally:
        with torch.no_grad():
            undo.restore()


def detach_state(model: nn.Module) -> None:
    """Put copies in place of state that is still part of an autograd graph.

    A framework's reset may call ``detach_()`` on it, which nothing could undo.
    """
    for module in nn.Module.modules(model):
        attributes = vars(module)
        holders = [
            h
            for h in (attributes, attributes.get("_buffers"), attributes.get("_memories"))
            if h is not None
        ]
        for holder in holders:
            for name, value in list(holder.items()):
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    holder[name] = value.detach().clone()


class _Undo:
    """What each object looked like, taken once per object."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._steps: list[Callable[[], None]] = []
        self.watched: list[Watched] = []
        self.watches_all = False  # no copies of other tensors than parameters, either

    def leave(self, values: list[Any]) -> None:
        """Never touch these."""
        self._seen.update({id(value): value for value in values})

    def copied(self, most: int) -> bool:
        """Copy what is watched if that is little, in plain memory; then nobody need watch."""
        held = [watched.tensor for watched in self.watched]
        if sum(t.numel() * t.element_size() for t in held) > most or not all(map(_plain, held)):
            return False
        for watched in self.watched:
            watched.save()
        return True

    def restore(self) -> None:
        for step in self._steps:
            step()

    def remember(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth < 0 or _is_immutable(value):
            return
        self._seen[id(value)] = value  # keeps it alive: ids stay unique
        is_parameter = isinstance(value, nn.Parameter)
        watch = is_parameter or (self.watches_all and isinstance(value, Tensor))
        if watch and _can_be_watched(value):
            held = [value, value.grad] if is_parameter and value.grad is not None else [value]
            watched = [Watched(t) for t in held if _can_be_watched(t)]
            self.watched += watched
            self._steps += [_flags_undo(value), *(w.restore for w in watched)]
        elif isinstance(value, Tensor):
            self._steps += [_values_undo(value), _flags_undo(value)]
        elif isinstance(value, dict):
            self._remember_dict(value, depth)
        elif isinstance(value, list | deque | set):
            self._remember_sequence(value, depth)
        elif isinstance(value, tuple):
            self._remember_all(value, depth)
        elif isinstance(value, np.ndarray):
            copy = value.copy()
            self._steps.append(lambda: np.copyto(value, copy))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._steps.append(lambda: _forget(value.set_state(state)))
        elif is_scripted(value):
            self._remember_all([*value.parameters(), *value.buffers()], depth)
        elif isinstance(value, nn.Module):
            self._remember_dict(vars(value), _DEPTH)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._remember_dict(vars(value), depth)

    def _remember_dict(self, value: dict[Any, Any], depth: int) -> None:
        items = list(value.items())

        def undo() -> None:
            if len(value) != len(items) or any(
                k not in value or value[k] is not v for k, v in items
            ):
                value.clear()
                value.update(items)

        self._steps.append(undo)
        self._remember_all([v for _, v in items], depth)

    def _remember_sequence(self, value: Any, depth: int) -> None:
        items = list(value)

        def undo() -> None:
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(items)

        self._steps.append(undo)
        self._remember_all(items, depth)

    def _remember_all(self, values: Any, depth: int) -> None:
        for item in values:
            self.remember(item, depth - 1 if not isinstance(item, Tensor) else depth)


def _is_immutable(value: Any) -> bool:
    return value is None or isinstance(
        value,
        str
        | bytes
        | int
        | float
        | complex
        | type
        | types.FunctionType
        | types.BuiltinFunctionType
        | types.MethodType
        | types.ModuleType
        | torch.dtype
        | torch.device
        | torch.Size,
    )


def _enclosed(function: Any) -> list[Any]:
    """What a hook can write to: what it closes over or is bound to."""
    if isinstance(function, types.MethodType):
        return [function.__self__]
    if isinstance(function, functools.partial):
        return [*_enclosed(function.func), *function.args, *function.keywords.values()]
    if not isinstance(function, types.FunctionType):
        return [function]  # an object that can be called
    found = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            found.append(cell.cell_contents)
    return [part for item in found for part in ([item] if not _is_hook(item) else _enclosed(item))]


def _is_hook(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.MethodType | functools.partial)


def _plain(tensor: Tensor) -> bool:
    """Of a dtype that torch copies and compares, in memory that this costs no wait for."""
    usual = tensor.dtype.itemsize > 1 and tensor.dtype.is_floating_point
    return type(tensor) in (Tensor, nn.Parameter) and usual and tensor.device.type == "cpu"


def _can_be_watched(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _values_undo(tensor: Tensor) -> Callable[[], None]:
    copy = tensor.detach().clone() if tensor.layout is torch.strided else None

    def undo() -> None:
        if copy is not None and not _same(tensor, copy):
            if _fits(tensor, copy):
                tensor.data.copy_(copy)
            else:  # a clone: the copy must stay good for another restore
                tensor.data = copy.clone()

    return undo


def _flags_undo(tensor: Tensor) -> Callable[[], None]:
    """Gradient and whether one is wanted; both can only be set on leaves."""
    leaf, required = tensor.is_leaf, tensor.requires_grad
    grad = tensor.grad if leaf else None

    def undo() -> None:
        if leaf:
            if tensor.requires_grad is not required:
                tensor.requires_grad_(required)
            if tensor.grad is not grad:
                tensor.grad = grad

    return undo


def _fits(tensor: Tensor, copy: Tensor) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device) == (copy.shape, copy.dtype, copy.device)


def _same(tensor: Tensor, copy: Tensor) -> bool:
    return _fits(tensor, copy) and (tensor.is_meta or bool(torch.equal(tensor, copy)))


def _remember_rng() -> Callable[[], None]:
    torch_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    )
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def undo() -> None:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return undo


def _forget(_: object) -> None:
    """Drop a result, so that an undo step returns None."""
