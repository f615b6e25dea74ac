# SPDX-License-Identifier: Apache-2.0
"""What an adapter is, and the few readings that all of them share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.trace.neurons.spec import NeuronSpec, Scalar, Surrogate

__all__ = [
    "Adapter",
    "is_own_class",
    "learned",
    "numbers",
    "scalar",
    "sigmoid",
    "surrogate_of",
]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One framework's neurons: which classes they are and how their rule is read.

    Attributes:
        name: the framework.
        bases: ``"module:Class"`` of the neurons' base classes, looked up in ``sys.modules`` only,
            so that no framework is ever imported for this.
        read: from a module to its spec; must not change the module.
        accepts: narrows ``bases`` down where they also cover modules that are no neurons.
    """

    name: str
    bases: tuple[str, ...]
    read: Callable[[nn.Module], NeuronSpec]
    accepts: Callable[[nn.Module], bool] = lambda module: True

    def classes(self) -> tuple[type, ...]:
        """The base classes that are loaded in this process."""
        found = []
        for base in self.bases:
            module_name, _, class_name = base.partition(":")
            candidate = getattr(sys.modules.get(module_name), class_name, None)
            if isinstance(candidate, type):
                found.append(candidate)
        return tuple(found)

    def owns(self, module: nn.Module) -> bool:
        """Whether ``module`` is one of this framework's neurons."""
        return isinstance(module, self.classes()) and self.accepts(module)


def scalar(value: Any, default: Scalar = 0.0) -> Scalar:
    """``value`` as a float, or as a detached tensor where it has several elements."""
    if value is None:
        return default
    if isinstance(value, Tensor):
        value = value.detach()
        return float(value) if value.numel() == 1 else value.clone()
    return float(value)


def learned(module: nn.Module, *names: str) -> tuple[str, ...]:
    """Those of ``names`` that are trainable parameters of ``module``."""
    parameters = dict(module.named_parameters(recurse=False))
    return tuple(name for name in names if name in parameters and parameters[name].requires_grad)


def numbers(source: object) -> dict[str, float]:
    """The public numeric attributes of a surrogate object (``alpha``, ``width``, ...)."""
    values: dict[str, float] = {}
    attributes = dict(vars(source)) if hasattr(source, "__dict__") else {}
    if isinstance(source, nn.Module):
        attributes |= dict(source.named_parameters(recurse=False))
    for name, value in attributes.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = float(value.detach())
        if not name.startswith("_") and isinstance(value, int | float) and type(value) is not bool:
            values[name] = float(value)
    return values


def surrogate_of(function: object) -> Surrogate | None:
    """The surrogate a callable object stands for: its class name, its numbers, itself."""
    if function is None:
        return None
    owner = getattr(function, "__self__", function)  # ``ATan.apply`` is named after its class
    name = getattr(owner, "__qualname__", None) or type(function).__name__
    return Surrogate(name.split(".")[0], numbers(function), function)


def is_own_class(module: nn.Module, package: str, *names: str) -> bool:
    """Whether ``module`` is exactly ``package``'s class of one of ``names``.

    A subclass may change any part of the rule, so it is never taken for exact.
    """
    cls = type(module)
    return cls.__name__ in names and cls.__module__.split(".")[0] == package


def sigmoid(value: Tensor) -> Tensor:
    """The logistic function of a detached tensor of any shape."""
    return torch.sigmoid(value.detach())
