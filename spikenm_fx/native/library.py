# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels as Python sees them: loading, ISA levels, and the C structures.

The library does not link an OpenMP runtime.  It borrows ``GOMP_parallel`` from the one that torch
has loaded, so that there is one thread pool and ``torch.set_num_threads`` counts; where torch's
runtime lacks that entry point, kernels run on one thread.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from spikenm_fx.native.mirror import check_mirrors

__all__ = [
    "KERNELS",
    "MIRRORS",
    "Call",
    "Draws",
    "Geometry",
    "Kernel",
    "Kernels",
    "NativeStatus",
    "Neuron",
    "Permutation",
    "Progress",
    "Scores",
    "available_kernels",
    "kernels",
    "load_library",
    "native_library",
    "native_status",
]

Kernel = Literal["fma", "lut", "event", "event8", "amx", "amx8"]
KERNELS: tuple[Kernel, ...] = ("fma", "lut", "event", "event8", "amx", "amx8")
"""Kernels of packed layers, in the order of their table."""

LEVELS = ("baseline", "v3", "v4", "amx")
ABI_VERSION = 7

_log = logging.getLogger("spikenm_fx.native")

_i64, _i32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
_u32, _f32, _f64 = ctypes.c_uint32, ctypes.c_float, ctypes.c_double


class Geometry(ctypes.Structure):
    """``snm_geometry`` of ``csrc/abi.h``."""

    _fields_ = [  # ctypes reads a plain list
        (name, _i64)
        for name in (
            *("steps", "images", "h", "w", "oh", "ow"),
            *("kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw"),
            *("groups", "cg", "og", "step_stride", "image_stride"),
        )
    ]


class Neuron(ctypes.Structure):
    """``snm_neuron`` of ``csrc/abi.h``."""

    _fields_ = [
        *((n, _ptr) for n in ("decay", "gain", "drive", "threshold", "reset", "v")),
        *((n, _ptr) for n in ("syn_decay", "syn_gain", "current")),
        *((n, _i32) for n in ("kind", "timing", "inclusive", "undecayed")),
    ]


class Call(ctypes.Structure):
    """``snm_call`` of ``csrc/abi.h``."""

    _fields_ = [
        ("geometry", ctypes.POINTER(Geometry)),
        ("input", _ptr),
        ("weights", _ptr),
        ("codes", _ptr),
        ("blocks", _ptr),
        ("n_blocks", _i64),
        ("kind", _i64),
        ("bias", _ptr),
        ("scale", _ptr),
        ("out", _ptr),
        ("out_channels_first", _i64),
        ("out_bits", _ptr),
        ("neuron", ctypes.POINTER(Neuron)),
        ("threads", _i64),
    ]


class Draws(ctypes.Structure):
    """``snm_draws`` of ``csrc/abi.h``."""

    _fields_ = [
        *((n, _ptr) for n in ("scores", "grad", "weight", "present", "mask", "out")),
        *((n, _i64) for n in ("lead", "m", "inner", "keep", "threads")),
        ("key0", _u32),
        ("key1", _u32),
        ("noisy", _i32),
        *((n, _f32) for n in ("kappa", "inverse_tau", "gain")),
        ("mode", _i32),
        ("credit_by_weight", _i32),
        ("credit", _ptr),
        ("momentum", _ptr),
        ("sums", _ptr),
        ("items", _i64),
        *((n, _f32) for n in ("prior", "decay", "rate", "inverse_size", "strength")),
        *((n, _f32) for n in ("inverse_temperature", "look", "keep_momentum")),
        ("absolute", _i32),
    ]


Progress = ctypes.CFUNCTYPE(_i32, _f64)
"""Told the share that is done; what is not 0 stops the search."""


class Scores(ctypes.Structure):
    """``snm_scores`` of ``csrc/abi.h``."""

    _fields_ = [
        ("scores", _ptr),
        *((n, _i64) for n in ("stride", "columns", "fixed", "keep", "of")),
    ]


class Permutation(ctypes.Structure):
    """``snm_permutation`` of ``csrc/abi.h``."""

    _fields_ = [
        ("parts", ctypes.POINTER(Scores)),
        ("n_parts", _i64),
        ("channels", _i64),
        ("order", _ptr),
        ("proposals", _i64),
        ("tries", _i64),
        *((n, _f64) for n in ("hot", "cold", "seconds")),
        ("seed", ctypes.c_uint64),
        ("progress", Progress),
    ]


_run = ctypes.CFUNCTYPE(_i32, ctypes.POINTER(Call))
_draws = ctypes.CFUNCTYPE(_i32, ctypes.POINTER(Draws))
_items = ctypes.CFUNCTYPE(_i64, ctypes.POINTER(Draws))
_elements = ctypes.CFUNCTYPE(None, _ptr, _ptr, _f32, _ptr, _i64, _i64)
_checksum = ctypes.CFUNCTYPE(ctypes.c_uint64, _ptr, _i64)
_permute = ctypes.CFUNCTYPE(_i32, ctypes.POINTER(Permutation))
_rows_to = ctypes.CFUNCTYPE(_i32, _ptr, _i64, _i64, _i64, _ptr, _i64)
_planes_to = ctypes.CFUNCTYPE(_i32, _ptr, _i64, _i64, _i64, _i64, _ptr, _i64)
_rows_from = ctypes.CFUNCTYPE(None, _ptr, _i64, _i64, _i64, _ptr, _i64)
_planes_from = ctypes.CFUNCTYPE(None, _ptr, _i64, _i64, _i64, _i64, _ptr, _i64)


class Kernels(ctypes.Structure):
    """``snm_kernels`` of ``csrc/abi.h``: the functions of one ISA level."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("lut", _run),
        ("fma", _run),
        ("event", _run),
        ("event8", _run),
        ("amx", _run),
        ("amx8", _run),
        ("integrate", _run),
        ("pack_rows", _rows_to),
        ("pack_planes", _planes_to),
        ("unpack_rows", _rows_from),
        ("unpack_planes", _planes_from),
        ("draws", _draws),
        ("items", _items),
        ("kept", _elements),
        ("decay", _elements),
        ("checksum", _checksum),
        ("permute", _permute),
        ("net_run", _ptr),  # called by the library itself
    ]


MIRRORS: dict[str, type[ctypes.Structure]] = {
    "snm_geometry": Geometry,
    "snm_neuron": Neuron,
    "snm_call": Call,
    "snm_draws": Draws,
    "snm_scores": Scores,
    "snm_permutation": Permutation,
    "snm_kernels": Kernels,
}
"""The mirror of each structure of ``csrc/abi.h``, by its C name."""


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Whether compiled kernels are there, and why not.

    Attributes:
        available: they are.
        reason: why they are not, else "".
        origin: ``"wheel"`` (compiled at install), ``"cache"``, ``"built"`` or "".
        path: of the library, or "".
        levels: ISA levels that this machine runs, best last.
        threads: whether torch's thread pool is shared; else one thread serves.
    """

    available: bool
    reason: str = ""
    origin: str = ""
    path: str = ""
    levels: tuple[str, ...] = ()
    threads: bool = False


def load_library(path: Path) -> ctypes.CDLL:
    """Load a compiled library, if Python's structures are the ones that it was compiled with.

    Args:
        path: of the shared library.

    Raises:
        OSError: if it cannot be loaded.
        MirrorError: if it was compiled from other structures.
    """
    library = ctypes.CDLL(str(path))
    if library.snm_abi_version() != ABI_VERSION:
        raise OSError(f"{path} is of another version: install spikenm_fx again")
    check_mirrors(library, MIRRORS, str(path))
    library.snm_level.restype = ctypes.POINTER(Kernels)
    return library


@cache
def _library() -> tuple[ctypes.CDLL | None, NativeStatus]:
    # Here, so that ``python -m spikenm_fx.native.build`` does not find itself imported already.
    from spikenm_fx.native.build import cached_library, wants_sanitizers
    from spikenm_fx.native.toolchain import BuildError

    try:
        built = cached_library(sanitize=wants_sanitizers())
        library = load_library(built.path)
    except (BuildError, OSError) as error:
        if os.environ.get("SPIKENM_FX_BUILD") != "0":  # else it was asked for
            # pip shows nothing of what a build says: this is where the user gets to know.
            reason = str(error).splitlines()[0]
            _log.warning("packed layers and mask draws run on torch alone: %s", reason)
        return None, NativeStatus(False, reason=str(error))
    levels = tuple(n for i, n in enumerate(LEVELS) if library.snm_level(_i32(i)))
    parallel = _gomp_parallel()
    library.snm_use_openmp(_ptr(parallel))
    status = NativeStatus(True, "", built.origin, str(built.path), levels, bool(parallel))
    return library, status


def _gomp_parallel() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded."""
    import torch  # noqa: F401  # its runtime must be there before we look for it

    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return None
    loaded = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    # Torch's own copy first: another library may have brought a second runtime.
    ours = sorted((p for p in loaded if "omp" in Path(p).name), key=lambda p: "torch" not in p)
    for path in ours:
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, _ptr).value
    return None


def native_library() -> ctypes.CDLL | None:
    """The library itself, for functions that are not of one ISA level; None where there is none."""
    return _library()[0]


def native_status() -> NativeStatus:
    """Whether the kernels can be used here; compiles them on the first call if need be."""
    return _library()[1]


@cache
def kernels(level: str | None = None) -> Kernels | None:
    """Kernels of an ISA level (None: the best that this machine has), or None if there are none."""
    library, status = _library()
    if library is None:
        return None
    level = level or status.levels[-1]
    if level not in status.levels:
        return None
    found: Kernels = library.snm_level(_i32(LEVELS.index(level))).contents
    return found


def available_kernels(level: str | None = None) -> tuple[Kernel, ...]:
    """Kernels of an ISA level (None: the best here): matrix tiles exist at the highest alone."""
    found = kernels(level)
    if found is None:
        return ()
    tiles = found.name == b"amx"
    return tuple(k for k in KERNELS if tiles or not k.startswith("amx"))
