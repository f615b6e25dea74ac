# SPDX-License-Identifier: Apache-2.0
"""The masked weight as users see it: writing to it is told, as it would change nothing."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from spikenm_fx._torch import no_torch_function

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["ComputedWeight", "computed"]


class ComputedWeight(Tensor):
    """A tensor that was computed of a parameter and a mask; every operation gives plain tensors.

    Initialising, clamping or otherwise writing to it, with or without ``.data``, would be forgotten
    at the next access: the first time that is done, a warning names the parameter to write to.
    """

    __torch_function__ = no_torch_function  # as of nn.Parameter
    owner: weakref.ref[MaskedWeight]

    @property
    def data(self) -> Tensor:
        """The values, which the layer does not use again."""
        owner = self.owner()
        if owner is not None:
            owner.forget_handed()
        return computed(cast("Tensor", Tensor.data.__get__(self)), self.owner)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        """Hand a value of the weight's shape to the layer, which decides what becomes of it."""
        owner = self.owner()
        if owner is None or self._is_a_parameter():
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        else:
            owner.replace(value)

    def detach(self) -> Tensor:
        """The values without a graph."""
        return computed(Tensor.detach(self), self.owner)

    def _is_a_parameter(self) -> bool:
        return bool(getattr(self, "_is_param", False))  # torch.nn.Parameter(weight) makes it one

    def _tell(self) -> None:
        owner = self.owner()
        if owner is not None and not self._is_a_parameter():
            owner.forget_handed()
            owner.run.warn(
                "written",
                f"{owner.name}.{owner.key} {owner.view.shape} was written to, but it is computed "
                "of a parameter and a mask at each access, so that nothing has changed: write to "
                f"{owner.key}_dense of the layer, or before spikenm_fx.sparsify",
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Tensor.detach(self).__reduce_ex__(protocol)


def computed(weight: Tensor, owner: weakref.ref[MaskedWeight]) -> Tensor:
    """Let ``weight``, of any shape, tell whoever writes to it."""
    weight.__class__ = ComputedWeight
    cast("ComputedWeight", weight).owner = owner
    return weight


def _telling(name: str) -> Any:
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def told(self: ComputedWeight, *args: Any, **kwargs: Any) -> Any:
        self._tell()
        return method(self, *args, **kwargs)

    return told


_HARMLESS = {"detach_", "requires_grad_", "share_memory_", "rename_", "set_"}
for _name in dir(Tensor):
    if _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS:
        setattr(ComputedWeight, _name, _telling(_name))
for _name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"):
    setattr(ComputedWeight, _name, _telling(_name))
