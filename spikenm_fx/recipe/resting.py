# SPDX-License-Identifier: Apache-2.0
"""Find state that a recipe's reset does not forget: what follows it is nobody else's fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import some_of

__all__ = ["state_that_stays", "what_to_reset"]

_RESETTING = re.compile(r"reset|clear|forget|init_(state|mem|hidden)|zero_state")
"""Names of methods that put state to rest."""


def state_that_stays(
    model: nn.Module, run: Callable[[nn.Module], Any], rest: Callable[[nn.Module], None]
) -> list[str]:
    """Names of modules that hold other tensors after a forward and a reset than before.

    Args:
        model: at rest.
        run: one forward.
        rest: what should forget all state.
    """
    before = _held(model)
    run(model)
    rest(model)
    return [
        name
        for name, tensors in _held(model).items()
        if len(tensors) != len(before[name]) or not all(map(torch.equal, tensors, before[name]))
    ]


def what_to_reset(model: nn.Module, stays: list[str]) -> str:
    """What the author of a recipe can do about state that stays, as a clause.

    Args:
        model: whose state it is.
        stays: what :func:`state_that_stays` found.
    """
    if not stays:
        return "it draws at random in eval mode, or keeps state where no module shows it"
    kinds = {type(model.get_submodule(name)) for name in stays}
    methods = {
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name in dir(kind)
        if _RESETTING.search(name) and name != "reset_parameters"
    }
    perhaps = f" that calls {some_of(sorted(methods))}" if methods else ""
    return (
        f"the recipe's reset leaves the state of {some_of(n or 'the model' for n in stays)}; give "
        f"reset: 'module:function', a function of the model{perhaps}"
    )


def _held(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of the tensors that each module holds beside its parameters, by its name."""
    return {
        name: [
            value.detach().clone()
            for value in (*vars(module).values(), *module._buffers.values())
            if isinstance(value, Tensor)
        ]
        for name, module in model.named_modules()
    }
