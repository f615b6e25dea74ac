# SPDX-License-Identifier: Apache-2.0
"""What compiled graphs tell the watch: one opaque operator for each call that a hook would see.

``torch.compile`` takes forward hooks into its graph.  In steps in which credits are due, for which
there is a graph of its own, it holds these operators; the graph of all other steps holds nothing of
the kind.  An operator finds its hook by a number that is read from a tensor, an input of the graph:
as a constant it would make a graph for every layer.  What it is given it copies, because a compiler
uses memory again.  Operators have an ordered effect, so that no pass removes or exchanges them.

What has to be asked of modules is asked while the graph is made, of the tensors that it is made
for: functions marked as constant run then, and leave no guard behind.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import fields
from types import EllipsisType, NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import (
    in_functorch,
    keep_in_order,
    runs_while_compiling,
    tree_leaves,
    tree_map,
)

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.forward_hooks import CallHook, LayerHook, NeuronHook

__all__ = ["Numbered", "can_tell", "tell_of_call", "tell_of_layer", "tell_of_neuron"]

_numbers = itertools.count(1)
_hooks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_PLAIN = (Tensor, bool, int, float, str, NoneType)
_layouts: list[Any] = []


class Numbered:
    """A hook that operators of a compiled graph find again; each copy has a number of its own.

    Attributes:
        ticket: the number, an int64 scalar on the CPU.
    """

    __slots__ = ("__weakref__", "ticket")
    ticket: Tensor

    def __post_init__(self) -> None:
        number = next(_numbers)
        _hooks[number] = self
        self.ticket = torch.tensor(number, dtype=torch.int64, device="cpu")

    def __getstate__(self) -> list[Any]:
        return [getattr(self, each.name) for each in fields(self)]  # type: ignore[arg-type]

    def __setstate__(self, state: list[Any]) -> None:
        for each, value in zip(fields(self), state, strict=True):  # type: ignore[arg-type]
            setattr(self, each.name, value)
        self.__post_init__()


@runs_while_compiling
def can_tell() -> bool:
    """Whether a graph that is being made now may hold our operators.

    Exports must run where this package is not installed, and inside of the transforms of torch.func
    one call stands for many.
    """
    return not (torch.compiler.is_exporting() or in_functorch())


def tell_of_layer(ticket: Tensor, args: tuple[Any, ...], output: Any) -> None:
    """Let the graph tell that a layer was called.

    Args:
        ticket: of its hook.
        args: what it was called with.
        output: what it gave.
    """
    if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
        saw_layer(ticket, args[0].detach(), list(output.shape))


def tell_of_neuron(
    hook: NeuronHook,
    module: nn.Module,
    current: Any,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Let the graph tell that a neuron is about to be called.

    Args:
        hook: of it.
        module: the neuron.
        current: its input.
        rest: further arguments.
        kwargs: keyword arguments.
    """
    leaves = tree_leaves((rest, kwargs))
    if not isinstance(current, Tensor) or not all(isinstance(leaf, _PLAIN) for leaf in leaves):
        return
    held = [getattr(module, name, None) for name in hook.state]
    state = [value.detach() for value in held if isinstance(value, Tensor)]
    layout = _number_of(tree_map(_blank, (rest, kwargs))) if leaves else 0
    others = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    saw_neuron(hook.ticket, current.detach(), state, others, layout)


def tell_of_call(ticket: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a module with watched layers is compiled: look at what its graph will not tell.

    Args:
        ticket: of its hook.
        args: of the call that it is compiled for.
        kwargs: likewise.
    """
    leaves = tree_leaves((args, kwargs))
    if all(isinstance(leaf, _PLAIN) for leaf in leaves) and _can_learn(ticket):
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _look(ticket, _number_of(tree_map(_blank, (args, kwargs))), *tensors)


@runs_while_compiling
def _can_learn(ticket: Tensor) -> bool:
    hook: CallHook = _hooks[int(ticket)]
    return not hook.looked and hook.watch.can_learn(hook.module)


@runs_while_compiling
def _look(ticket: Tensor, layout: int, *tensors: Tensor) -> bool:
    hook: CallHook = _hooks[int(ticket)]
    hook.looked = True
    args, kwargs = _filled(layout, tensors)
    hook.watch.look(hook.module, args, kwargs)
    return True


def _blank(leaf: Any) -> Any:
    """``...`` in place of a tensor."""
    return ... if isinstance(leaf, Tensor) else leaf


@runs_while_compiling
def _number_of(blank: Any) -> int:
    """A number for arguments with ``...`` where their tensors were."""
    if blank not in _layouts:
        _layouts.append(blank)
    return _layouts.index(blank) + 1


def _filled(layout: int, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments again, with ``tensors`` in their places."""
    left = iter(tensors)
    blank = _layouts[layout - 1] if layout else ((), {})
    args, kwargs = tree_map(lambda v: next(left) if isinstance(v, EllipsisType) else v, blank)
    return args, kwargs


@torch.library.custom_op("spikenm_fx::saw_layer", mutates_args=())
def saw_layer(ticket: Tensor, inputs: Tensor, shape: Sequence[int]) -> None:
    """A layer was called.

    Args:
        ticket: of its hook.
        inputs: of any shape.
        shape: of its output.
    """
    hook: LayerHook | None = _hooks.get(int(ticket))
    if hook is not None and hook.watch.recording(hook.source.layer, hook.source, compiled=True):
        hook.watch.saw_layer(hook.source, inputs.clone(), torch.Size(shape), None)
        hook.source.close_at_backward(hook.watch.run.step)


@torch.library.custom_op("spikenm_fx::saw_neuron", mutates_args=())
def saw_neuron(
    ticket: Tensor,
    current: Tensor,
    state: Sequence[Tensor],
    others: Sequence[Tensor],
    layout: int,
) -> None:
    """A neuron is about to be called.

    Args:
        ticket: of its hook.
        current: its input, of any shape.
        state: what it holds of the steps before, of any shapes.
        others: tensors among its further arguments.
        layout: of these arguments.
    """
    hook: NeuronHook | None = _hooks.get(int(ticket))
    if hook is not None and hook.watch.recording(hook.neuron.module, hook.neuron, compiled=True):
        rest, kwargs = _filled(layout, [other.clone() for other in others])
        hook.watch.heard_of_neuron(hook.neuron, current.clone(), rest, kwargs, state)


@saw_layer.register_fake
def _(ticket: Tensor, inputs: Tensor, shape: Sequence[int]) -> None:
    return None


@saw_neuron.register_fake
def _(
    ticket: Tensor,
    current: Tensor,
    state: Sequence[Tensor],
    others: Sequence[Tensor],
    layout: int,
) -> None:
    return None


keep_in_order(saw_layer, saw_neuron)
