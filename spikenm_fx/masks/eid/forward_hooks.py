# SPDX-License-Identifier: Apache-2.0
"""The forward hooks of a watch: what they do at once, and what they let compiled graphs tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import disable_dynamo, has_saved_tensor_hooks, is_captured
from spikenm_fx.masks.eid.operators import (
    Numbered,
    bring_slopes_back,
    can_tell,
    lies_elsewhere,
    tell_of_call,
    tell_of_layer,
    tell_of_neuron,
)
from spikenm_fx.masks.eid.slopes import Neuron, Source

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.watch import Watch

__all__ = ["CallHook", "FirstHook", "LayerHook", "NeuronHook", "first_of", "remove_hooks"]


@dataclass(slots=True, eq=False)
class LayerHook(Numbered):
    """After a watched layer."""

    watch: Watch
    source: Source

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep what went in."""
        if not (module.training and self.watch.awake):
            return
        if torch.compiler.is_compiling():
            if can_tell() and torch.is_grad_enabled():
                tell_of_layer(self.ticket, args, output)
                if lies_elsewhere(self.ticket):
                    self.source.pending.append(output)
        else:
            _after_layer(self, module, args, output)


@dataclass(slots=True, eq=False)
class NeuronHook(Numbered):
    """Before a watched neuron; ``state`` names the attribute that holds its membrane."""

    watch: Watch
    neuron: Neuron
    state: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what goes in."""
        if not (module.training and self.watch.awake and (args or kwargs)):
            return
        if torch.compiler.is_compiling():
            if can_tell() and torch.is_grad_enabled():
                current, rest, others = first_of(args, kwargs)
                tell_of_neuron(self, module, current, rest, others)
                bring_slopes_back(self, current)
        else:
            _before_neuron(self, module, args, kwargs)


@dataclass(slots=True, eq=False)
class FirstHook(Numbered):
    """Before a watched layer whose neuron is not known yet: is there a module around it?"""

    watch: Watch
    source: Source

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that the layer is called by itself."""
        if not (module.training and self.watch.awake) or self.source.connected:
            return
        if torch.compiler.is_compiling():
            self.source.alone = True
        else:
            _before_layer(self, module)


@dataclass(slots=True, eq=False)
class CallHook(Numbered):
    """Connects the watch on the first training forward of whatever module is called."""

    watch: Watch
    module: nn.Module
    looked: bool = False  # before it was compiled

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the forward of a module that contains watched layers."""
        if not (module.training and self.watch.awake):
            return
        if torch.compiler.is_compiling():
            if can_tell():
                tell_of_call(self.ticket, args, kwargs)
        elif args or kwargs:
            _before_call(self.watch, module, args, kwargs)


@disable_dynamo  # where a module's hooks are no part of its graph, they are not compiled either
def _after_layer(hook: LayerHook, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if args and isinstance(output, Tensor) and hook.watch.recording(module, hook.source):
        hook.watch.saw_layer(hook.source, args[0], output.shape, output)


@disable_dynamo
def _before_neuron(
    hook: NeuronHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if hook.watch.recording(module, hook.neuron):
        askable = _graph_can_be_asked()
        with _outside_of_checkpoints():
            hook.watch.saw_neuron(hook.neuron, args, kwargs, askable)


@disable_dynamo
def _before_layer(hook: FirstHook, module: nn.Module) -> None:
    if hook.watch.recording(module, hook.source):
        hook.source.alone = True


@disable_dynamo
def _before_call(
    watch: Watch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if watch.connected or watch.busy:
        return
    if not is_captured():
        with _outside_of_checkpoints():
            watch.connect(module, args, kwargs)
    else:
        watch.postpone()


def first_of(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The first argument of a call, by place or by name, and the others."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def remove_hooks(model: nn.Module) -> None:
    """Take away every hook of this file."""
    for module in nn.Module.modules(model):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            ours = [key for key, hook in hooks.items() if isinstance(hook, Numbered)]
            for key in ours:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _outside_of_checkpoints() -> Any:
    """What is computed inside is not counted among what a checkpointed part saves."""
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _graph_can_be_asked() -> bool:
    """Not inside of a checkpointed part, whose graph is there in the backward pass alone."""
    return not has_saved_tensor_hooks()
