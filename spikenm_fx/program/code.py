# SPDX-License-Identifier: Apache-2.0
"""A program as data: values, operations, and the words that both are written as.

The library reads the same words (``native/csrc/net.h``), checks every one of them when a program is
opened (``net_model.cpp``), and runs the operations in their order.  Layout of the words:

.. code-block:: text

    8 words        version, values, operations, outputs, fixed steps, only steps, only images,
                   inputs
    5 per value    bits, timed, height, width, channels
    26 per port    value, rank, 8 x (role, size, joined): each input, then each output
    32 per op      code, in, in, out, out, 4 tensors, what :class:`Op` calls settings

A value holds for every time step and image ``height * width * channels`` numbers, channels
innermost.  Tensors are numbered by the list of names beside the program; number 0 is the program.

Operations between a RECALL and its STORE run step by step, all others once for all steps.  Version
1 has one input, which its last word does not count, and no operation from RECALL on: programs that
need no more are of that version, so that earlier releases read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = [
    "INPUTS",
    "POINTWISE",
    "RANK",
    "VERSION",
    "Axis",
    "Code",
    "Op",
    "Port",
    "Program",
    "Role",
    "ValueType",
]

VERSION = 2
RANK = 8
INPUTS = 8
"""At most, of one program."""
NO_VALUE = -1
_OP_WORDS = 32


class Code(IntEnum):
    """What an operation does; its settings, in their order, behind the dash.

    LAYER: convolution or product with a weight - keep, of, outputs, inputs of a group, groups,
    kernel, stride, padding, dilation (two each), flat (1: inputs are all numbers of a token; 2: in
    the order channel, height, width).
    NEURON: all time steps of a neuron - reset, timing, inclusive, synapse (as
    :class:`spikenm_fx.pack.engine.neuron.NeuronRule` numbers them), emits (0 spikes, 1 its
    membrane, 2 counts), forgets, number of its state.
    POOL: - mode (0 max, 1 mean, 2 adaptive max, 3 adaptive mean), kernel, stride, padding, dilation
    (two each), counts padding, divisor.
    JOIN: - mode (0 a + b, 1 a - b, 2 a * b, 3 (1 - a) * b).
    AFFINE: a factor and a shift.  RELU.  CONCAT: of channels.
    REDUCE: over time - mode (0 sum, 1 mean, 2 last step).
    STRIDED: nested loops over numbers of a token (:mod:`spikenm_fx.program.strided`) - mode (as of
    JOIN; 4 copies one operand), loops, five of (size, and how far output and operands move), offset
    of the first operand.
    NORM: over the channels of each pixel, as torch's layer norm: weight, bias and epsilon.
    RECALL: what STORE stored in the step before; before the first one its tensor, or zeros - number
    of the state, forgets.
    STORE: - number of the state.
    COMPARE: spikes where a number passes a threshold - mode (0 >, 1 >=, 2 <, 3 <=).
    POINTWISE: - function (:data:`POINTWISE`, in order).
    SOFTMAX: along one axis of a token - mode (0 softmax, 1 its logarithm), size of the axis, how
    far its numbers lie apart.
    STEPS: one token without time, cut into one token for each of the fixed time steps.
    """

    LAYER = 1
    NEURON = 2
    POOL = 3
    JOIN = 4
    AFFINE = 5
    RELU = 6
    CONCAT = 7
    REDUCE = 8
    STRIDED = 9
    NORM = 10
    RECALL = 11
    STORE = 12
    COMPARE = 13
    POINTWISE = 14
    SOFTMAX = 15
    STEPS = 16


POINTWISE = ("sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "exp")
"""Functions of one number."""


class Role(IntEnum):
    """What an axis of an input or output runs over."""

    TIME = 0
    BATCH = 1
    CHANNEL = 2
    HEIGHT = 3
    WIDTH = 4


@dataclass(frozen=True, slots=True)
class Axis:
    """A part of an axis of the input or of an output.

    Attributes:
        role: what it runs over.
        size: of the example; of an output's batch axis, which of the input's it is.
        joined: it is one axis of the tensor with the part before.
    """

    role: Role
    size: int
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """The input, or an output: a value and the tensor that it is for the caller."""

    value: int
    axes: tuple[Axis, ...]

    def words(self) -> list[int]:
        """As the library reads it."""
        flat = [word for a in self.axes for word in (int(a.role), a.size, int(a.joined))]
        return [self.value, len(self.axes), *flat, *[0] * (3 * RANK - len(flat))]


@dataclass(frozen=True, slots=True)
class ValueType:
    """Of one value: spikes as bits or floats, whether it has time steps, and its sizes."""

    bits: bool
    timed: bool
    height: int
    width: int
    channels: int


@dataclass(slots=True, eq=False)
class Op:
    """One operation.

    Attributes:
        code: what it does.
        inputs: values that it reads, none, one or two.
        outputs: values that it writes, if any; a neuron's second one is its membrane.
        settings: see :class:`Code`.
        tensors: names of up to four; None where there is none.
        name: the module that it was, for reports.
    """

    code: Code
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    settings: tuple[int, ...] = ()
    tensors: tuple[str | None, ...] = ()
    name: str = ""

    def words(self, numbers: dict[str, int]) -> list[int]:
        """As the library reads it."""
        ins, outs = ([*v, NO_VALUE, NO_VALUE][:2] for v in (self.inputs, self.outputs))
        tensors = [-1 if name is None else numbers[name] for name in self.tensors]
        head = [int(self.code), *ins, *outs, *tensors, *[-1] * (4 - len(tensors))]
        words = [*head, *self.settings]
        return [*words, *[0] * (_OP_WORDS - len(words))]


@dataclass(slots=True, eq=False)
class Program:
    """A network as operations.

    Attributes:
        values: by their number.
        ops: in the order in which they run.
        inputs: of the model, in order.
        outputs: of the model, in order.
        fixed_steps: time steps where no axis of the input tells them; 0 elsewhere.
        only_steps: the one number of steps that it is right for; 0 for any.
        only_images: the same of the batch.
    """

    values: list[ValueType]
    ops: list[Op]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    fixed_steps: int = 0
    only_steps: int = 0
    only_images: int = 0

    @property
    def version(self) -> int:
        """The first version that has all of it."""
        plain = len(self.inputs) == 1 and all(op.code < Code.RECALL for op in self.ops)
        return 1 if plain else VERSION

    def tensor(self, names: Sequence[str]) -> Tensor:
        """The program as an int64 tensor.

        Args:
            names: of all tensors, as operations number them from 1 on.
        """
        numbers = {name: number for number, name in enumerate(names, 1)}
        head = [self.version, len(self.values), len(self.ops), len(self.outputs), self.fixed_steps]
        head += [self.only_steps, self.only_images]
        words = [*head, len(self.inputs) if self.version > 1 else 0]
        for v in self.values:
            words += [int(v.bits), int(v.timed), v.height, v.width, v.channels]
        for port in (*self.inputs, *self.outputs):
            words += port.words()
        for op in self.ops:
            words += op.words(numbers)
        return torch.tensor(words, dtype=torch.int64)
