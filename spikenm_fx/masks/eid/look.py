# SPDX-License-Identifier: Apache-2.0
"""What is learnt of neurons by a run before a module is compiled: graphs cannot be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import is_fsdp_module, run_as_eager, tree_map
from spikenm_fx.masks.eid.connect import connect
from spikenm_fx.masks.eid.slopes import Neuron, Source
from spikenm_fx.masks.gather import gathered_inside
from spikenm_fx.state import preserved

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.watch import Watch

__all__ = ["can_learn", "look"]


def look(watch: Watch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Learn of the neurons in ``module`` what a compiled graph cannot be asked.

    It is run as it is, once, before it is compiled: which neuron each layer drives, whether
    neurons step through time, and where in memory their inputs lie.  All is afterwards as
    it was before.

    Args:
        watch: of it.
        module: about to be compiled.
        args: arguments of a forward call.
        kwargs: keyword arguments of it.
    """
    with run_as_eager():
        if not watch.connected:
            connect(watch, module, args, kwargs)
        if any(_unlocated(source) for source in watch.sources):
            _look_once(watch, module, args, kwargs)


def can_learn(watch: Watch, module: nn.Module) -> bool:
    """Whether :func:`look` at ``module`` would show anything that is not known yet."""
    waits = [s for s in watch.sources if not s.connected or _unlocated(s)]
    inside = {id(child) for child in nn.Module.modules(module)} if waits else set()
    return watch.needs_neuron and any(id(source.layer) in inside for source in waits)


def _unlocated(source: Source) -> bool:
    return bool(source.posts) and source.same_order is None and not source.frozen


def _look_once(
    watch: Watch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    step, kept = watch.seen_step, [each.put_aside() for each in _all(watch)]
    watch.seen_step, watch.looking, watch.run.quiet = watch.run.step, True, True
    # hooks of FSDP would let go of what they have gathered for the call that is on its way
    run = module.forward if is_fsdp_module(module) else module
    try:
        with gathered_inside(module), preserved(module), torch.enable_grad():
            run(*tree_map(_leaf, args), **tree_map(_leaf, kwargs))
    except Exception as error:  # the user's code, called out of its context
        watch.run.warn(
            "look",
            f"{type(module).__name__} could not be run before it was compiled "
            f"({type(error).__name__}: {error}): EID takes it that inputs of neurons lie in "
            "memory as the outputs of their layers do",
        )
    finally:
        watch.seen_step, watch.looking, watch.run.quiet = step, False, False
        for each, own in zip(_all(watch), kept, strict=True):
            each.take_back(own)


def _all(watch: Watch) -> list[Source | Neuron]:
    return [*watch.sources, *watch.neurons.values()]


def _leaf(value: Any) -> Any:
    """A tensor, of any shape, at which a graph begins; all else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)
