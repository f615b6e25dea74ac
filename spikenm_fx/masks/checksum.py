# SPDX-License-Identifier: Apache-2.0
"""A checksum of a tensor's memory: were its values written to since?  Not meant against forgery."""

from __future__ import annotations

import ctypes
import zlib

import numpy as np
from torch import Tensor, nn

from spikenm_fx.native.library import kernels

__all__ = ["checksum"]

# Words of a row; sums of rows and of columns together tell where something moved.  Odd, so that
# sign bits that all flip do not cancel.
_COLUMNS = 511


def checksum(tensor: Tensor) -> object:
    """A number that changes with the values; None for memory that is not this process's to read.

    Nothing of torch is called, so that nothing is launched and no graph notices.

    Args:
        tensor: of any shape; all of its storage counts.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return None
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if not size:
        return 0
    found = kernels()
    if found is not None:
        return found.checksum(storage.data_ptr(), size)
    memory = memoryview((ctypes.c_uint8 * size).from_address(storage.data_ptr()))
    whole = size // 8 // _COLUMNS * _COLUMNS
    words = np.frombuffer(memory, dtype=np.uint64, count=whole).reshape(-1, _COLUMNS)
    rest = np.frombuffer(memory, dtype=np.uint8)[whole * 8 :]
    sums = words.sum(0).tobytes(), words.sum(1).tobytes(), rest.tobytes()
    return tuple(map(zlib.crc32, sums))
