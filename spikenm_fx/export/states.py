# SPDX-License-Identifier: Apache-2.0
"""A model as a function of its input and its neurons' states, always from rest.

What a module remembers lies in its attributes, which exporters freeze into constants without a
word, at whatever value they have.  Here they are the attributes that differ after one call from
rest.  Those that a next call reads become arguments and results of a model that takes one step a
call; all others are at rest whenever the function is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import NormBase, tree_flatten, tree_unflatten
from spikenm_fx.errors import ExportError
from spikenm_fx.state import reset_to_rest

__all__ = ["Slot", "Stepwise", "stepwise"]

_PROBES = (-50.0, 0.5)
"""Values that a state is given to see whether anybody reads it."""


@dataclass(slots=True, eq=False)
class Slot:
    """One tensor that a module remembers from call to call.

    Attributes:
        name: of the module and the attribute.
        module: that remembers it; None where the caller carries the state.
        key: of the attribute.
        rest: its value at rest, as the module keeps it.
        initial: the same in the shape that it has after a call.
    """

    name: str
    module: nn.Module | None
    key: str
    rest: Any
    initial: Tensor

    @property
    def value(self) -> Any:
        """As the module has it now."""
        return self._holder()[self.key]

    @value.setter
    def value(self, value: Any) -> None:
        """Give the module another one."""
        self._holder()[self.key] = value

    def _holder(self) -> dict[str, Any]:
        assert self.module is not None
        return next(holder for holder in _holders(self.module) if self.key in holder)

    def leave_buffers(self) -> None:
        """Be a plain attribute: tracing tensors cannot stand in for a buffer."""
        assert self.module is not None
        if self.key in self.module._buffers:
            vars(self.module)[self.key] = self.module._buffers.pop(self.key)


class Stepwise(nn.Module):
    """``(x, *states) -> (outputs..., *new states)`` with the model's parameters.

    Attributes:
        net: the model.
        names: of the states that are arguments and results.
        initial: their values before the first call.
        outputs: how many tensors the model itself returns.
        carried: how the caller's state is nested, its other leaves included; None where the
            modules keep the states.
    """

    def __init__(
        self,
        net: nn.Module,
        exposed: Sequence[Slot],
        hidden: Sequence[Slot],
        outputs: int,
        carried: tuple[Any, list[Any]] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.outputs = net, outputs
        self.names = [slot.name for slot in exposed]
        self.initial = [slot.initial for slot in exposed]
        self.__dict__["_slots"] = (list(exposed), list(hidden))
        self.__dict__["carried"] = carried

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """One call; the modules are at rest before and afterwards, but for ``states``.

        Args:
            x: the model's input: ``[N, ...]`` of a step, or ``[T, N, ...]``.
            states: of the shapes of ``initial``.
        """
        if self.carried is not None:
            return self._handing_on(x, states)
        exposed, hidden = self.__dict__["_slots"]
        at_rest = [(slot, slot.value) for slot in (*hidden, *exposed)]
        for slot, state in zip(exposed, states, strict=True):
            slot.value = state
        try:
            out = [t for t in tree_flatten(self.net(x))[0] if isinstance(t, Tensor)]
            return (*out, *(slot.value for slot in exposed))
        finally:
            for slot, value in at_rest:  # while it is traced, a stand-in for what is at rest
                slot.value = value

    def _handing_on(self, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        structure, leaves = self.__dict__["carried"]
        waiting = iter(states)
        flat = [next(waiting) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        out, new = self.net(x, tree_unflatten(flat, structure))
        tensors = [t for part in (out, new) for t in tree_flatten(part)[0]]
        return tuple(t for t in tensors if isinstance(t, Tensor))


def stepwise(net: nn.Module, x: Tensor, *, single: bool) -> Stepwise:
    """The function behind a model.

    Args:
        net: a copy at rest, which this changes: buffers that are states become attributes.
        x: as the model takes it, ``[N, ...]`` of one step or ``[T, N, ...]``.
        single: one call is one step, so that states are handed on.

    Raises:
        ExportError: for a model that remembers something else than tensors.
    """
    _plain_numbers(net)
    with torch.no_grad():
        if "state" in inspect.signature(net.forward).parameters:
            return _carried(net, x)
        before = {id(m): {k: v for h in _holders(m) for k, v in h.items()} for m in net.modules()}
        outputs = len([t for t in tree_flatten(net(x))[0] if isinstance(t, Tensor)])
        slots = [
            slot
            for name, module in net.named_modules()
            for slot in _changed(name, module, before[id(module)])
        ]
        reset_to_rest(net)
        for slot in slots:
            slot.value = slot.rest
        read = _read(Stepwise(net, slots, [], outputs), x, slots) if single else []
        for slot in read:
            slot.leave_buffers()
    return Stepwise(net, read, [slot for slot in slots if slot not in read], outputs)


def _read(function: Stepwise, x: Tensor, slots: list[Slot]) -> list[Slot]:
    """The states on which outputs or other states depend."""
    start = [slot.initial for slot in slots]
    wanted = function(x, *start)
    found = []
    for index, slot in enumerate(slots):
        for probe in _PROBES:
            states = list(start)
            states[index] = torch.full_like(slot.initial, probe)
            seen = function(x, *states)
            if any(not torch.equal(a, b) for a, b in zip(seen, wanted, strict=True)):
                found.append(slot)
                break
    return found


def _carried(net: nn.Module, x: Tensor) -> Stepwise:
    """A model whose caller carries the state: ``forward(x, state=None) -> (out, state)``."""
    out, state = net(x, None)
    leaves, structure = tree_flatten(state)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    slots = [
        Slot(f"state_{number}", None, "", None, torch.zeros_like(value))
        for number, value in enumerate(tensors)
    ]
    outputs = len([t for t in tree_flatten(out)[0] if isinstance(t, Tensor)])
    return Stepwise(net, slots, [], outputs, (structure, leaves))


def _plain_numbers(net: nn.Module) -> None:
    """Integer buffers of one number become numbers: code branches on them (snnTorch's resets)."""
    for module in net.modules():
        if isinstance(module, NormBase):
            continue
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.dim() == 0 and not buffer.is_floating_point():
                del module._buffers[key]
                vars(module)[key] = buffer.item()


def _changed(name: str, module: nn.Module, before: dict[str, Any]) -> Iterator[Slot]:
    for holder in _holders(module):
        for key, value in list(holder.items()):
            old = before.get(key)
            if key.startswith("_") or value is old or isinstance(value, nn.Module):
                continue
            if isinstance(value, Tensor):
                yield Slot(f"{name}.{key}".lstrip("."), module, key, old, _initial(old, value))
            elif _differs(old, value) and not _is_empty(value):
                raise ExportError(
                    f"export.onnx: {name or 'the model'} keeps {key!r} ({type(value).__name__}) "
                    "from one call to the next, and a file can carry tensors only; keep tensors"
                )


def _differs(old: Any, value: Any) -> bool:
    try:
        return bool(old != value)
    except Exception:  # what cannot be compared holds tensors
        return True


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | set) and not value


def _initial(old: Any, value: Tensor) -> Tensor:
    """The state before the first call, of the shape that it has afterwards."""
    if isinstance(old, Tensor) and old.shape == value.shape:
        return old.detach().clone()
    if isinstance(old, int | float):
        return torch.full_like(value, float(old))
    return torch.zeros_like(value)


def _holders(module: nn.Module) -> tuple[dict[str, Any], ...]:
    memories = vars(module).get("_memories")
    named = (memories,) if isinstance(memories, dict) else ()
    return (*named, module._buffers, vars(module))
