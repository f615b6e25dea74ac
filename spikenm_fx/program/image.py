# SPDX-License-Identifier: Apache-2.0
"""The bytes of an engine: a packed file (safetensors) that also holds its program.

:func:`spikenm_fx.load_packed` reads the weights of such a file as of any other.  What makes it an
engine is two more entries of its metadata: ``program``, the names of the tensors that operations
number, the program itself first, and ``digest``, the SHA-256 of all bytes of the file with its own
64 digits read as zeros, which the library checks without any JSON or safetensors library.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from spikenm_fx.errors import PackedFileError
from spikenm_fx.pack.weights.files import packed_bytes
from spikenm_fx.program.held import Memory

if TYPE_CHECKING:
    from spikenm_fx.program.lower import Lowered

__all__ = ["DIGEST", "PROGRAM", "image_of", "sealed"]

PROGRAM = "::program"
"""Name of the tensor that is the program."""
DIGEST = "0" * 64


def image_of(lowered: Lowered, result: str = "tensor", memory: Memory = "fast") -> bytes:
    """Everything that an engine is, as the bytes of its file.

    Args:
        lowered: the program, its packed weights and tensors.
        result: how the model returns its outputs: ``"tensor"``, ``"tuple"`` or ``"list"``.
        memory: how whoever opens the file keeps the weights.

    Raises:
        PackedFileError: for a name that a file cannot hold.
    """
    names = [PROGRAM]
    for op in lowered.program.ops:
        names += [name for name in op.tensors if name is not None and name not in names]
    if any("\n" in name for name in names):
        raise PackedFileError("a module's name holds a line break; rename it to save an engine")
    tensors = {**lowered.tensors, PROGRAM: lowered.program.tensor(names[1:])}
    metadata = {
        "program": "".join(f"{name}\n" for name in names),
        "program_version": str(lowered.program.version),
        "result": result,
        "memory": memory,
        "folded": "" if lowered.folded is None else "{} {}".format(*lowered.folded),
        "operations": json.dumps(
            [f"{op.code.name.lower()} {op.name}" for op in lowered.program.ops]
        ),
        "digest": DIGEST,
    }
    if len(lowered.names) > 1:
        metadata |= {"inputs": json.dumps(lowered.names), "taken": json.dumps(lowered.taken)}
    content = packed_bytes(lowered.packed, tensors=tensors, metadata=metadata)
    return sealed(content)


def sealed(content: bytes) -> bytes:
    """The same file with the digest that belongs to it.

    Args:
        content: of a file whose digest is all zeros.

    Raises:
        PackedFileError: if there is not one digest to be found.
    """
    sign = f'"digest":"{DIGEST}"'.encode()
    if content.count(sign) != 1:
        raise PackedFileError("a name in this network looks like the digest of its file; rename it")
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(sign, f'"digest":"{digest}"'.encode())
