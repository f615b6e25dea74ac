# SPDX-License-Identifier: Apache-2.0
"""Parameters that a module hands out computed, masked ones: a trace sees the parameter itself.

Whoever computes a parameter at each access calls :func:`read_parameter`.  Where this thread traces,
the computation is left out of the trace, as what happens inside a layer is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

__all__ = ["ParameterReader", "is_reading", "read_parameter", "reading"]

ParameterReader: TypeAlias = Callable[[tuple[Tensor, ...], Callable[[], Tensor]], Tensor]
"""Called with parameters and what computes the tensor handed out instead of the first of them."""

_local = threading.local()


def read_parameter(parameters: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, which a trace of this thread records as a use of the first parameter.

    Args:
        parameters: that one, of any shape, and others that go into the computation.
        compute: makes the tensor that is handed out, of the first one's shape.
    """
    readers: list[ParameterReader] = getattr(_local, "readers", [])
    return readers[-1](parameters, compute) if readers else compute()


def is_reading() -> bool:
    """Whether this thread traces: what runs is no forward of the user's."""
    return bool(getattr(_local, "readers", []))


@contextlib.contextmanager
def reading(reader: ParameterReader) -> Iterator[None]:
    """Hand what this thread reads to ``reader`` inside the block."""
    readers: list[ParameterReader] = _local.__dict__.setdefault("readers", [])
    readers.append(reader)
    try:
        yield
    finally:
        readers.pop()
