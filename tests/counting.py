# SPDX-License-Identifier: Apache-2.0
"""Counts what a piece of code asks of torch: kernel launches, host syncs, tensors left alive.

A launch is an ATen operation that would start a kernel on a device: views and bare allocations are
none, an operation over a list of tensors is one.  A sync is one that hands a value to Python.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
)
SYNCS = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "equal", "unique"}
    | {"_unique2", "masked_select", "allclose", "unique_consecutive", "unique_dim"}
)
FREE = frozenset(
    {"detach", "lift_fresh", "alias", "sym_size", "sym_stride", "_reshape_alias"}
    | {"_record_function_enter_new", "_record_function_exit"}
)


@dataclass
class Launches(TorchDispatchMode):
    """Counts inside a ``with`` block.

    Attributes:
        kernels: launches by name.
        syncs: host syncs by name.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put_", "index_put") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in SYNCS or indexed:
            self.syncs[name] += 1
        if not (func.is_view or name in ALLOCATIONS or name in FREE):
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.kernels.values())

    @property
    def waits(self) -> int:
        return sum(self.syncs.values())


def launches(run: Callable[[], object]) -> Launches:
    """What ``run()`` asks for."""
    with Launches() as counted:
        run()
    return counted


def living() -> dict[int, int]:
    """Bytes of every storage that a tensor known to the garbage collector holds, by address."""
    gc.collect()
    kinds = (Tensor, nn.Parameter)  # and no fake or sparse tensors, which have no storage
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    tensors = [tensor for tensor in found if tensor.layout is torch.strided]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def living_bytes() -> int:
    """Their sum."""
    return sum(living().values())
