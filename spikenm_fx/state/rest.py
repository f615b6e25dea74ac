# SPDX-License-Identifier: Apache-2.0
"""Run somebody's model for measuring: in eval mode, from rest, and afterwards as it was."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import dynamo_is_imported
from spikenm_fx.state.snapshot import preserved, preserved_records

__all__ = [
    "RESET_METHODS",
    "as_given",
    "preserved_in_eval",
    "reset_to_rest",
    "takes_no_arguments",
    "uncompiled",
]

RESET_METHODS = ("reset", "reset_mem", "reset_states", "reset_state", "reset_membrane", "n_reset")
"""How SNN packages name the method that forgets a neuron's state; tried in this order."""


@contextlib.contextmanager
def preserved_in_eval(model: nn.Module) -> Iterator[None]:
    """Within it the model may run; afterwards it and every random generator are as before.

    The body sees the model in eval mode, without gradients.  What monitors recorded is gone again.
    """
    with preserved_records(model), preserved(model), torch.no_grad():
        model.eval()
        yield


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within it what ``torch.compile`` made runs eagerly.

    Compiled code does not look whether a module has got hooks since (dynamo's
    ``skip_nnmodule_hook_guards``), and then a watched layer seems not to run.
    """
    if not dynamo_is_imported():  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def reset_to_rest(model: nn.Module) -> None:
    """Call each module's own reset, so that a batch starts from rest.

    SpikingJelly, snnTorch, sinabs, rockpool and BrainCog name it differently but agree that it is
    a method without arguments; models whose caller carries the state need none.
    """
    for module in model.modules():
        reset = _own_reset(module)
        if reset is not None:
            reset()


def _own_reset(module: nn.Module) -> Callable[[], Any] | None:
    for name in RESET_METHODS:
        method: Callable[[], Any] | None = getattr(module, name, None)
        if method is not None and callable(method) and takes_no_arguments(method):
            return method
    return None


def takes_no_arguments(method: Callable[..., Any]) -> bool:
    """Whether ``method`` can be called with nothing; False where its signature is not known."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )


def as_given(args: Sequence[Any]) -> tuple[Any, ...]:
    """Examples for one more forward: one that gives its input another shape, leaves these alone.

    Args:
        args: positional arguments; tensors of any shape.

    Returns:
        The same values in the same memory, as tensors of their own.
    """
    return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in args)
