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
    autograd_inside_operator,
    in_functorch,
    keep_in_order,
    runs_while_compiling,
    trace_autograd,
    tree_leaves,
    tree_map,
)
from spikenm_fx.masks.eid.slopes import slopes_of

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.forward_hooks import CallHook, LayerHook, NeuronHook

__all__ = [
    "Numbered",
    "bring_slopes_back",
    "can_tell",
    "lies_elsewhere",
    "tell_of_call",
    "tell_of_layer",
    "tell_of_neuron",
]

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
        ticket: of its hook, a scalar.
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
        ticket: of its hook, a scalar.
        args: of the call that it is compiled for.
        kwargs: likewise.
    """
    leaves = tree_leaves((args, kwargs))
    if all(isinstance(leaf, _PLAIN) for leaf in leaves) and _can_learn(ticket):
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _look(ticket, _number_of(tree_map(_blank, (args, kwargs))), *tensors)


@runs_while_compiling
def lies_elsewhere(ticket: Tensor) -> bool:
    """Whether the neuron's inputs lie in memory otherwise than the outputs of the layer do.

    Args:
        ticket: of the hook of a layer, a scalar.
    """
    hook: LayerHook = _hooks[int(ticket)]
    return hook.source.same_order is False


def bring_slopes_back(hook: NeuronHook, current: Any) -> None:
    """Let the graph bring slopes at a neuron's input to the outputs of layers that lie otherwise.

    Args:
        hook: of the neuron, whose call was told already.
        current: its input, with its graph.
    """
    for place in _elsewhere(hook.ticket):
        outputs = list(hook.watch.sources[place].pending)
        hook.watch.sources[place].pending.clear()
        if not outputs or not all(tensor.requires_grad for tensor in [current, *outputs]):
            continue
        slopes = slopes_at_input(hook.ticket, current.detach())
        before = trace_autograd(True)
        grads = torch.autograd.grad(current, outputs, slopes, retain_graph=True, allow_unused=True)
        trace_autograd(before)
        pairs = zip(grads, outputs, strict=True)
        found = [torch.zeros_like(y) if grad is None else grad for grad, y in pairs]
        saw_slopes(hook.ticket, place, [slope.detach() for slope in found])


@runs_while_compiling
def _elsewhere(ticket: Tensor) -> tuple[int, ...]:
    """Places in the watch of the layers before a neuron whose outputs lie otherwise."""
    hook: NeuronHook = _hooks[int(ticket)]
    if hook.neuron.spec().step_mode != "multi":
        return ()
    return tuple(
        place
        for place, source in enumerate(hook.watch.sources)
        if source.same_order is False and hook.neuron in source.posts
    )


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


@torch.library.custom_op("spikenm_fx::slopes_at_input", mutates_args=())
def slopes_at_input(ticket: Tensor, current: Tensor) -> Tensor:
    """Slopes of the call that a neuron was just seen to get; zeros where it is not kept.

    Args:
        ticket: of its hook, a scalar.
        current: its input, of any shape.
    """
    hook: NeuronHook | None = _hooks.get(int(ticket))
    calls = hook.neuron.calls[-1:] if hook is not None else []
    if hook is None or not calls:
        return torch.zeros_like(current)
    with autograd_inside_operator(), torch.enable_grad():
        slopes = slopes_of(hook.neuron, hook.neuron.spec(), calls)
    found = torch.zeros_like(current) if slopes is None else slopes[0]
    return found.to(current.dtype).expand_as(current).clone()


@torch.library.custom_op("spikenm_fx::saw_slopes", mutates_args=())
def saw_slopes(ticket: Tensor, place: int, slopes: Sequence[Tensor]) -> None:
    """Slopes at a neuron's input were brought to the outputs of a layer.

    Args:
        ticket: of the neuron's hook, a scalar.
        place: of the layer in the watch.
        slopes: one for each call of the layer, of the shape of its output.
    """
    hook: NeuronHook | None = _hooks.get(int(ticket))
    if hook is None:
        return
    source = hook.watch.sources[place]
    if source.uses and hook.watch.recording(source.layer, source, compiled=True):
        source.mapped = [slope.clone() for slope in slopes]


@slopes_at_input.register_fake
def _(ticket: Tensor, current: Tensor) -> Tensor:
    return torch.empty_like(current)


@saw_slopes.register_fake
def _(ticket: Tensor, place: int, slopes: Sequence[Tensor]) -> None:
    return None


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


keep_in_order(saw_layer, saw_neuron, slopes_at_input, saw_slopes)
