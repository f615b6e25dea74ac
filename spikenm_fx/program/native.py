# SPDX-License-Identifier: Apache-2.0
"""A network inside the library: the only place that knows its C functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spikenm_fx.errors import PackedFileError, PackError
from spikenm_fx.native.library import native_library

__all__ = ["Net", "Observer"]

_empty_like, _FLOAT = torch.empty_like, torch.float32

RANK = 8
MESSAGE = 512
_SHAPES = 64  # of inputs that are remembered
_i32, _i64, _ptr, _text = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p

Observer: TypeAlias = Callable[[int, int, int], None]
"""Told after each operation: its number, and the addresses of its first input and its output."""
_Observe = ctypes.CFUNCTYPE(None, _ptr, _i64, _ptr, _ptr)


class _Shape(ctypes.Structure):
    """One input's shape, as ``NetShape`` in ``net_plan.h``."""

    _fields_ = (("size", _ptr), ("rank", _i32))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A call of one shape: what the library made of it, its outputs' shapes, or one like it."""

    shape: tuple[int, ...]
    handle: int
    like: Tensor | None
    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The inputs' shapes as the library takes them, and the outputs' shapes."""

    given: Any
    held: tuple[Any, ...]  # what ``given`` points to
    outputs: tuple[tuple[int, ...], ...]


class Net:
    """One network with its states; the library checks all that it is given.

    Args:
        content: the bytes of an engine's file.
        name: of the file, for messages.

    Raises:
        PackedFileError: if these are no such bytes.
        PackError: if no kernels are compiled here.
    """

    def __init__(self, content: bytes, name: str) -> None:
        self._handle = None
        library = native_library()
        if library is None:
            raise PackError(
                "a program needs the compiled kernels: spikenm_fx.native_status() says why they "
                "are missing"
            )
        self._library = _declared(library)
        message = ctypes.create_string_buffer(MESSAGE)
        self._handle = self._library.spikenm_open_bytes(content, len(content), message)
        if not self._handle:
            raise PackedFileError(f"{name}: {message.value.decode(errors='replace')}")
        self.outputs: int = self._library.spikenm_outputs(self._handle)
        self.inputs: int = self._library.spikenm_inputs(self._handle)
        self._known: dict[tuple[bool, tuple[tuple[int, ...], ...]], _Shapes] = {}
        self._message = message
        self._observer: Any = None
        self._last: list[_Prepared | None] = [None, None]  # of whole inputs, and of steps
        self._prepared: dict[tuple[bool, tuple[int, ...]], _Prepared] = {}
        self._go = self._library.snm_net_go
        self._threads = 0
        self._pointer_array = _ptr * self.outputs

    def __del__(self) -> None:
        if self._handle:
            self._library.spikenm_close(self._handle)

    def shapes(
        self, shapes: tuple[tuple[int, ...], ...], *, step: bool
    ) -> tuple[tuple[int, ...], ...]:
        """Shapes of all outputs.

        Args:
            shapes: of the inputs.
            step: they are one time step, without its axis.

        Raises:
            PackError: for inputs that the network does not take.
        """
        return self._shapes(shapes, step=step).outputs

    def _shapes(self, shapes: tuple[tuple[int, ...], ...], *, step: bool) -> _Shapes:
        key = (step, shapes)
        if key not in self._known:
            sizes, ranks = (_i64 * (RANK * self.outputs))(), (_i32 * self.outputs)()
            held = tuple((_i64 * len(shape))(*shape) for shape in shapes)
            each = (_Shape(ctypes.addressof(h), len(h)) for h in held)
            given = (_Shape * len(shapes))(*each)
            self._raise_unless(
                self._library.snm_net_shapes(
                    self._handle, given, len(shapes), int(step), sizes, ranks, self._message
                )
            )
            if len(self._known) > _SHAPES:
                self._known.clear()
            found = (tuple(sizes[i * RANK : i * RANK + ranks[i]]) for i in range(self.outputs))
            self._known[key] = _Shapes(given, held, tuple(found))
        return self._known[key]

    def quick(self, x: Tensor, step: bool, threads: int) -> Tensor | list[Tensor] | None:
        """As :meth:`call`, of one input shaped as the last one; an only output comes by itself.

        Nothing is looked up that need not be: a small network takes less time than that.

        Args:
            x: any input.
            step: it is one time step.
            threads: at most.

        Returns:
            None where :meth:`call` must look at the input, or say what is wrong with it.
        """
        if x.dtype is not _FLOAT or not x.is_cpu or x.requires_grad or not x.is_contiguous():
            return None
        last = self._last[step]
        if last is None or x.shape != last.shape:
            last = self._prepare(x, step=step)
            if last is None:
                return None
        if threads != self._threads:
            self._library.snm_net_threads(self._handle, threads)
            self._threads = threads
        if last.like is not None:
            y = _empty_like(last.like)
            return None if self._go(last.handle, x.data_ptr(), y.data_ptr()) else y
        found = [torch.empty(size, dtype=_FLOAT, device="cpu") for size in last.outputs]
        pointers = self._pointer_array(*[y.data_ptr() for y in found])
        return None if self._go(last.handle, x.data_ptr(), pointers) else found

    def _prepare(self, x: Tensor, *, step: bool) -> _Prepared | None:
        shape = tuple(x.shape)
        found = self._prepared.get((step, shape))
        if found is None:
            if len(self._prepared) >= _SHAPES:  # they live as long as the network
                return None
            known = self._shapes((shape,), step=step)
            handle = self._library.snm_net_prepare(
                self._handle, known.given, 1, int(step), self._message
            )
            self._raise_unless(0 if handle else -1)
            sizes = known.outputs
            like = torch.empty(sizes[0], dtype=_FLOAT, device="cpu") if len(sizes) == 1 else None
            found = self._prepared[step, shape] = _Prepared(shape, handle, like, sizes)
        self._last[step] = found
        return found

    def call(self, inputs: tuple[Tensor, ...], *, step: bool, threads: int) -> list[Tensor]:
        """Run on contiguous fp32 tensors.

        Args:
            inputs: in order, as :meth:`shapes` takes their shapes.
            step: they are one time step.
            threads: at most.
        """
        shapes = self._shapes(tuple(tuple(x.shape) for x in inputs), step=step)
        found = [torch.empty(size, dtype=torch.float32, device="cpu") for size in shapes.outputs]
        pointers = self._pointer_array(*[y.data_ptr() for y in found])
        given = (_ptr * len(inputs))(*[x.data_ptr() for x in inputs])
        code = self._library.snm_net_call(
            self._handle, given, shapes.given, len(inputs), int(step), threads, pointers,
            self._message,
        )  # fmt: skip
        self._raise_unless(code)
        return found

    def reset(self) -> None:
        """All states back to rest."""
        self._library.spikenm_reset(self._handle)

    def input(self, index: int = 0) -> tuple[tuple[int, ...], int, tuple[bool, ...]]:
        """The example's shape, the axis of time (-1: none), and which axes are free.

        Args:
            index: of the input.
        """
        shape, free, axis = (_i64 * RANK)(), (_i32 * RANK)(), _i32()
        rank = self._library.spikenm_input_at(self._handle, index, shape, ctypes.byref(axis), free)
        return tuple(shape[:rank]), axis.value, tuple(bool(f) for f in free[:rank])

    def level(self, level: int) -> bool:
        """Run on an ISA level, -1 for the best; False where this machine lacks it."""
        return bool(self._library.snm_net_level(self._handle, level) == 0)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the layouts that operations run on, and of what calls keep between them."""
        layouts, plan = _i64(), _i64()
        self._library.snm_net_bytes(self._handle, ctypes.byref(layouts), ctypes.byref(plan))
        return layouts.value, plan.value

    def op_bytes(self, count: int) -> list[int]:
        """Bytes of the layouts of each operation.

        Args:
            count: how many operations there are.
        """
        return [self._library.snm_net_op_bytes(self._handle, op) for op in range(count)]

    def stored(self, tensor: int) -> bytes | None:
        """The bytes of a tensor of the file, where weights stay packed; None for any other one.

        Args:
            tensor: by its number in the program.
        """
        size = self._library.snm_net_stored(self._handle, tensor, None)
        if size < 0:
            return None
        found = ctypes.create_string_buffer(size)
        self._library.snm_net_stored(self._handle, tensor, found)
        return found.raw

    def observe(self, observer: Observer | None) -> None:
        """Let somebody see, and change, what each operation gives.

        Args:
            observer: None for nobody any more.
        """
        self._observer = (
            _Observe()  # a null pointer
            if observer is None
            else _Observe(lambda _, op, given, out: observer(op, given, out))
        )
        self._library.snm_net_observe(self._handle, self._observer, None)

    def _raise_unless(self, code: int) -> None:
        if code:
            raise PackError(self._message.value.decode(errors="replace"))


def _declared(library: Any) -> Any:
    if library.spikenm_open_bytes.restype is not _ptr:
        library.spikenm_outputs.argtypes = library.spikenm_inputs.argtypes = [_ptr]
        library.spikenm_close.argtypes = library.spikenm_reset.argtypes = [_ptr]
        library.spikenm_close.restype = library.spikenm_reset.restype = None
        library.spikenm_input_at.argtypes = [_ptr, _i32, _ptr, _ptr, _ptr]
        library.snm_net_shapes.argtypes = [_ptr, _ptr, _i32, _i32, _ptr, _ptr, _text]
        library.snm_net_call.argtypes = [_ptr, _ptr, _ptr, _i32, _i32, _i64, _ptr, _text]
        library.snm_net_prepare.argtypes = [_ptr, _ptr, _i32, _i32, _text]
        library.snm_net_prepare.restype = _ptr
        library.snm_net_go.argtypes = [_ptr] * 3
        library.snm_net_threads.argtypes = [_ptr, _i64]
        library.snm_net_threads.restype = None
        library.snm_net_level.argtypes = [_ptr, _i32]
        library.snm_net_bytes.argtypes = [_ptr] * 3
        library.snm_net_op_bytes.argtypes = [_ptr, _i64]
        library.snm_net_op_bytes.restype = _i64
        library.snm_net_stored.argtypes = [_ptr, _i64, _ptr]
        library.snm_net_stored.restype = _i64
        library.snm_net_observe.argtypes = [_ptr, _Observe, _ptr]
        library.snm_net_observe.restype = library.snm_net_bytes.restype = None
        library.spikenm_open_bytes.argtypes = [_text, ctypes.c_size_t, _text]
        library.spikenm_open_bytes.restype = _ptr
    return library
