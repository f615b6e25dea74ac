# SPDX-License-Identifier: Apache-2.0
"""Run somebody's model and leave it as it was: state, buffers, mode, hooks, gradients, RNG."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["preserved", "reset_to_rest"]

RESET_METHODS = ("reset", "reset_mem", "reset_states", "reset_state", "n_reset")
"""How SNN packages name the method that forgets a neuron's state; tried in this order."""

# torch's own tables: parameters are not changed by a forward, hooks are taken off by handle, and
# buffers are put back one by one.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True, slots=True)
class _Kept:
    """An attribute's value, and a copy of its content where a forward could change it in place."""

    value: Any
    copy: Any = None
    version: int | None = None


def _keep(value: Any) -> _Kept:
    if isinstance(value, nn.Parameter):
        return _Kept(value)
    if isinstance(value, Tensor) and not value.is_inference():
        return _Kept(value, value.detach().clone(), value._version)
    if type(value) in (list, dict, set):
        return _Kept(value, value.copy())
    return _Kept(value)


def _give_back(kept: _Kept) -> Any:
    value = kept.value
    if kept.version is not None and value._version != kept.version:
        with torch.no_grad():
            value.copy_(kept.copy)
    elif type(value) is list and kept.copy is not None:
        value[:] = kept.copy
    elif type(value) in (dict, set) and kept.copy is not None:
        value.clear()
        value.update(kept.copy)
    return value


class _Snapshot:
    """Everything of a model's modules that one forward may change."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (
                module,
                {k: _keep(v) for k, v in vars(module).items() if k not in _INTERNAL},
                {k: _keep(v) for k, v in module._buffers.items()},
                {
                    (k, key): _keep(value)
                    for k, table in vars(module).items()
                    if k not in _INTERNAL and type(table) is dict
                    for key, value in table.items()
                },
            )
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def restore(self) -> None:
        for module, attributes, buffers, inner in self._modules:
            now = vars(module)
            for name in [k for k in now if k not in _INTERNAL and k not in attributes]:
                del now[name]
            for name, kept in attributes.items():
                now[name] = _give_back(kept)
            # Tensors held in tables (SpikingJelly's _memories) may have been written in place.
            for kept in inner.values():
                _give_back(kept)
            for name in [k for k in module._buffers if k not in buffers]:
                del module._buffers[name]
            for name, kept in buffers.items():
                module._buffers[name] = _give_back(kept)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Within it the model may run; afterwards it and every random generator are as before.

    The body sees the model in eval mode, without gradients.  Parameters are not copied: running a
    model in eval mode does not change them.
    """
    snapshot = _Snapshot(model)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            model.eval()
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        snapshot.restore()


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
        if method is not None and callable(method) and _needs_no_argument(method):
            return method
    return None


def _needs_no_argument(method: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )
