# SPDX-License-Identifier: Apache-2.0
"""Copies of models whose own way of copying does not work."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["deepcopied"]


def deepcopied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """``copy.deepcopy(model)``, also of modules whose ``__deepcopy__`` raises.

    sinabs' recurrent layers build themselves anew from arguments and lack some of those; such
    modules are copied as torch copies any other one.

    Args:
        model: any model.
        memo: what stands for objects of it, as ``copy.deepcopy`` takes it; it is not changed.

    Raises:
        Exception: whatever another part of the model raises.
    """
    given = dict(memo or {})
    try:
        return copy.deepcopy(model, dict(given))
    except Exception:
        broken = [m for m in nn.Module.modules(model) if _own_copy_raises(m, given)]
        if not broken:
            raise
    for module in reversed(broken):  # those inside others first
        _copy_plainly(module, given)
    return copy.deepcopy(model, given)


def _own_copy_raises(module: nn.Module, memo: Mapping[int, Any]) -> bool:
    if not hasattr(type(module), "__deepcopy__"):
        return False
    try:
        copy.deepcopy(module, dict(memo))
    except Exception:  # a module's own __deepcopy__ may raise anything
        return True
    return False


def _copy_plainly(module: nn.Module, memo: dict[int, Any]) -> None:
    """Enter a copy of a module, made of copies of all that it holds."""
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    twin.__dict__.update(copy.deepcopy(vars(module), memo))
