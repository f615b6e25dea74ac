# SPDX-License-Identifier: Apache-2.0
"""Which tensor a running module really multiplies with data: a weight, or what is made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spikenm_fx._torch import DispatchMode, operator_name, storage_id, tree_flatten

__all__ = ["Multiplied", "ProductWatch"]

_FACTORS = {
    "mm": (0, 1),
    "addmm": (1, 2),
    "mv": (0, 1),
    "addmv": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "convolution": (0, 1),
}
"""Places of the two factors among the arguments of torch's own products."""


@dataclass(frozen=True, slots=True)
class Multiplied:
    """One product of data with a weight.

    Attributes:
        names: of the parameters that the weight is made of, the largest first.
        operator: torch's name of the product, ``"mm"``, ``"convolution"``, ...
        args: its arguments.
        data: which of them is the data.
        weight: which of them is the weight.
        output: what came out.
    """

    names: tuple[str, ...]
    operator: str
    args: tuple[Any, ...]
    data: int
    weight: int
    output: Tensor

    @property
    def operand(self) -> Tensor:
        """The weight as it is multiplied."""
        found: Tensor = self.args[self.weight]
        return found

    @property
    def as_layers_weight(self) -> Tensor:
        """The same with one row per output, as a Linear or Conv holds it."""
        turned = self.weight > self.data and self.operator not in ("linear", "convolution")
        return self.operand.mT if turned else self.operand


class ProductWatch(DispatchMode):
    """Within it each product of data with something made of parameters alone is shown.

    Args:
        model: whose parameters and buffers are no data.
        seen: called with each product.
    """

    def __init__(self, model: nn.Module, seen: Callable[[Multiplied], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        parameters = dict(nn.Module.named_parameters(model))
        self._sizes = {name: t.numel() for name, t in parameters.items()}
        self._seen = seen
        # tensors are kept with what they are made of: their storage is not used again meanwhile
        self._made: dict[int, tuple[tuple[str, ...], Tensor]] = {
            storage_id(t): ((), t) for _, t in nn.Module.named_buffers(model) if t.numel()
        }
        self._made |= {storage_id(t): ((n,), t) for n, t in parameters.items() if t.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        made = [self._names_of(t) for t in given]
        name = operator_name(func) or ""
        if name in _FACTORS:
            self._product(name, tuple(args), out)
        elif not all(names is not None for names in made):
            for tensor in (t for t in tree_flatten(out)[0] if isinstance(t, Tensor)):
                self._made.pop(storage_id(tensor), None)  # data was written into it
        else:
            names = dict.fromkeys(name for one in made for name in one or ())
            largest = sorted(names, key=lambda one: -self._sizes[one])
            for tensor in (t for t in tree_flatten(out)[0] if isinstance(t, Tensor)):
                if tensor.numel():
                    self._made.setdefault(storage_id(tensor), (tuple(largest), tensor))
        return out

    def _names_of(self, tensor: Tensor) -> tuple[str, ...] | None:
        """What ``tensor`` is made of; None for data."""
        found = self._made.get(storage_id(tensor))
        return None if found is None else found[0]

    def _product(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        places = _FACTORS[name]
        for weight, data in (places[::-1], places):
            names = self._names_of(args[weight])
            if names:
                self._seen(Multiplied(names, name, args, data, weight, out))
                return
