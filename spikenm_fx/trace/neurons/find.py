# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are spiking neurons, and what each of them computes.

Three ways, in this order: classes the user registered, bases of the frameworks that are loaded
(:mod:`~spikenm_fx.trace.neurons.adapters`), and structure, for hand-written neurons.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from spikenm_fx._torch import is_scripted
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.state import RESET_METHODS
from spikenm_fx.trace.execution.intercept import function_of_apply
from spikenm_fx.trace.neurons.adapters import ADAPTERS
from spikenm_fx.trace.neurons.adapters.adapter import scalar
from spikenm_fx.trace.neurons.spec import NeuronSpec, Scalar

__all__ = ["find_neurons", "neuron_spec", "register_neuron", "registered_neurons"]

N = TypeVar("N", bound=type[nn.Module])
SpecReader: TypeAlias = Callable[[nn.Module], NeuronSpec]

MEMBRANES = frozenset(
    {"v", "mem", "v_mem", "vmem", "membrane", "membrane_potential", "mem_potential"}
    | {"u", "potential", "v_seq"}
)
THRESHOLDS = ("v_threshold", "threshold", "thresh", "v_th", "vth", "thr", "Vth", "V_th")
DECAYS = ("decay", "beta", "leak", "tau_decay")

_lock = threading.Lock()
_registered: dict[type[nn.Module], SpecReader | None] = {}


def register_neuron(cls: N, read: SpecReader | None = None) -> N:
    """Tell the tracer that ``cls`` is a neuron; also usable as a class decorator.

    Args:
        cls: the module class; subclasses count as well.
        read: reads a module's :class:`NeuronSpec`; by default attributes are read by their usual
            names and the spec is not ``exact``.

    Raises:
        TypeError: if ``cls`` is not a class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_neuron takes a class of nn.Module, got {cls!r}")
    with _lock:
        _registered[cls] = read
    return cls


def registered_neurons() -> dict[type[nn.Module], SpecReader | None]:
    """What :func:`register_neuron` was told so far."""
    with _lock:
        return dict(_registered)


def neuron_spec(module: nn.Module) -> NeuronSpec | None:
    """The spec of ``module``, with the values its parameters have now; None if it is no neuron."""
    for cls in type(module).__mro__:
        if cls in _registered:
            return (_registered[cls] or _read_by_name)(module)
    for adapter in ADAPTERS:
        if adapter.owns(module):
            return adapter.read(module)
    return _read_by_name(module) if _looks_like_neuron(module) else None


def find_neurons(model: nn.Module) -> dict[str, NeuronSpec]:
    """Every neuron of ``model`` by qualified name; parts of a neuron are not listed again."""
    found: dict[str, NeuronSpec] = {}
    for name, module in _outermost_first(model):
        if not any(name.startswith(f"{outer}.") for outer in found):
            spec = neuron_spec(module)
            if spec is not None:
                found[name] = spec
    return found


def _outermost_first(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # nn.Module's own: some models override named_modules with another signature.
    return iter(nn.Module.named_modules(model))


def _looks_like_neuron(module: nn.Module) -> bool:
    """No weights inside, and either a surrogate in its code or a membrane that is reset."""
    if type(module).__module__.startswith("torch.") or is_scripted(module):
        return False
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or _has_weights(module):
        return False
    parts = list(nn.Module.modules(module))
    around = any(adapter.owns(part) for part in parts[1:] for adapter in ADAPTERS)
    if around and _memories(module):
        return False  # it keeps a state of its own beside that of a neuron: code around it
    if any(_reaches_surrogate(part) for part in parts):
        return True
    if around:
        return len(list(module.children())) == 1  # a thin wrapper around one neuron
    names = set(vars(module)) | set(module._buffers) | set(_memories(module))
    resets = any(hasattr(module, name) for name in RESET_METHODS)
    return bool(names & MEMBRANES) and (resets or "mem" in _names_in(type(module).forward))


def _has_weights(module: nn.Module) -> bool:
    if any(is_weight_layer(part) for part in nn.Module.modules(module)):
        return True
    return any(p.dim() >= 2 and min(p.shape[:2]) > 1 for p in nn.Module.parameters(module))


def _memories(module: nn.Module) -> dict[str, Any]:
    memories = vars(module).get("_memories")
    return memories if isinstance(memories, dict) else {}


def _reaches_surrogate(module: nn.Module) -> bool:
    """Whether an attribute or a method of ``module`` is, or names, an autograd Function."""
    if any(_is_surrogate(value) for value in vars(module).values()):
        return True
    if any(_function_reaches(f) for f in vars(module).values() if inspect.isfunction(f)):
        return True
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            break
        for member in vars(cls).values():
            if _is_surrogate(member) or _function_reaches(_plain_function(member)):
                return True
    return False


def _is_surrogate(value: object) -> bool:
    if isinstance(value, type):
        return issubclass(value, torch.autograd.Function) and value is not torch.autograd.Function
    return function_of_apply(value) is not None


def _plain_function(member: object) -> object:
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def _function_reaches(function: object, depth: int = 2) -> bool:
    if not isinstance(function, types.FunctionType) or depth == 0:
        return False
    for cell in function.__closure__ or ():
        try:
            if _is_surrogate(cell.cell_contents):
                return True
        except ValueError:  # an empty cell
            continue
    if _defines_backward(function):
        return True
    named = [function.__globals__.get(name) for name in _names_in(function)]
    return any(_is_surrogate(value) for value in named) or any(
        _function_reaches(value, depth - 1)
        for value in named
        if isinstance(value, types.FunctionType) and not value.__module__.startswith("torch")
    )


def _defines_backward(function: types.FunctionType) -> bool:
    """Whether it builds a Function class inside, as surrogate factories do."""
    return any(
        isinstance(const, types.CodeType) and {"forward", "backward"} <= set(const.co_names)
        for const in function.__code__.co_consts
    )


def _names_in(function: object) -> set[str]:
    code = getattr(function, "__code__", None)
    if code is None:
        return set()
    nested = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*(const.co_names for const in nested))


def _read_by_name(module: nn.Module) -> NeuronSpec:
    """A spec from attributes with the usual names: informative, never ``exact``."""
    attributes = [*vars(module), *module._parameters, *module._buffers, *_memories(module)]
    reset = next((n for n in RESET_METHODS if callable(getattr(module, n, None))), None)
    return NeuronSpec(
        framework="unknown",
        class_name=type(module).__name__,
        decay=_first_number(module, DECAYS, 1.0),
        threshold=_first_number(module, THRESHOLDS, 1.0),
        reset="none" if reset is None else "hard",
        state=tuple(name for name in attributes if name in MEMBRANES),
        reset_call=reset,
        learned=tuple(n for n, p in module.named_parameters(recurse=False) if p.requires_grad),
    )


def _first_number(module: nn.Module, names: tuple[str, ...], default: float) -> Scalar:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, Tensor | int | float) and not isinstance(value, bool):
            return scalar(value)
    return default
