# SPDX-License-Identifier: Apache-2.0
"""Products with raw parameters, ``F.conv2d(x, self.w)``: which parameter, summed along which axis.

A parameter may pass through operations before it is multiplied with data.  Those that move its
axes, or keep every zero a zero, are followed back; behind any other a mask would not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from spikenm_fx.trace.analysis.ops import MATMULS, RESHAPES, op_name
from spikenm_fx.trace.execution.values import SurrogateCall, ValueInfo

__all__ = ["Product", "parameter_behind", "product_of"]

_DEPTH = 12

_CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "cuda", "cpu"}
_COPIES = {"contiguous", "clone", "detach", "alias", "data", "lift_fresh", "requires_grad"}
_KEEPS_ZEROS = _CASTS | _COPIES | {"neg", "abs", "relu", "tanh", "sign", "square", "dropout"}


@dataclass(frozen=True, slots=True)
class Product:
    """One call that multiplies data with a parameter.

    Attributes:
        parameter: its qualified name.
        axis: the parameter's axis that is summed over, its input channels; None if undecided.
        groups: groups that share this axis (transposed convolutions).
        undecided: why ``axis`` is None.
    """

    parameter: str
    axis: int | None
    groups: int = 1
    undecided: str = ""


class _Undecided(Exception):
    """The axis cannot be told, or a mask on the parameter would not be one on the product."""


def product_of(node: fx.Node) -> Product | None:
    """What ``node`` multiplies with, if that is made of parameters alone; else None."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in MATMULS:
        return None
    for place, operand in enumerate(_operands(node)):
        found = _matrix_behind(operand)
        if found is not None:
            name = str(found.target)
            try:
                axis, groups = _summed(node, operand, place)
                return Product(name, _back(operand, found, axis), groups)
            except _Undecided as reason:
                return Product(name, None, undecided=str(reason))
    return None


def parameter_behind(node: fx.Node) -> str | None:
    """The matrix parameter that ``node`` is made of, if it is made of parameters only."""
    found = _matrix_behind(node)
    return None if found is None else str(found.target)


def _matrix_behind(node: fx.Node, depth: int = _DEPTH) -> fx.Node | None:
    """The node of the largest parameter behind ``node``."""
    if depth == 0 or node.op in ("placeholder", "call_module", "output"):
        return None
    if node.op == "get_attr":
        matrix = len(_shape(node)) >= 2 and isinstance(node.meta.get("tensor"), nn.Parameter)
        return node if matrix else None
    if not node.all_input_nodes or isinstance(node.target, SurrogateCall):
        return None
    found = []
    for source in node.all_input_nodes:
        one = _matrix_behind(source, depth - 1)
        if one is None and source.op != "get_attr":
            return None
        found += [] if one is None else [one]
    return max(found, key=lambda one: one.meta["tensor"].numel(), default=None)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The factors, without a bias."""
    given: list[Any] = list(node.args)
    name = op_name(node)
    if name == "einsum":
        given = given[1:]
        if len(given) == 1 and isinstance(given[0], Sequence):
            given = list(given[0])
    elif name in ("addmm", "baddbmm", "addmv"):
        given = given[1:3]
    elif name not in ("bilinear", "scaled_dot_product_attention"):
        named = [node.kwargs[k] for k in ("input", "weight", "other", "mat2") if k in node.kwargs]
        given = [*given[:2], *named][:2]
    return [operand for operand in given if isinstance(operand, fx.Node)]


def _summed(node: fx.Node, operand: fx.Node, place: int) -> tuple[int, int]:
    """The axis of ``operand`` that ``node`` sums over, and the groups that it is made of."""
    name, rank = op_name(node), len(_shape(operand))
    if name == "einsum":
        return _summed_by_einsum(str(node.args[0]), place), 1
    if name == "linear":
        return rank - 1, 1
    if name.startswith("conv"):
        if place != 1:
            raise _Undecided("it is the input of a convolution")
        transposed = name.startswith("conv_transpose")
        groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
        if name == "conv":  # aten.convolution(x, w, b, stride, padding, dilation, transposed, ...)
            transposed, groups = bool(node.args[6]), node.args[8]
        return (0, int(groups)) if transposed else (1, 1)
    if name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv"):
        return (rank - 1 if place == 0 else rank - 2), 1
    raise _Undecided(f"{name} has no one axis of input channels")


def _summed_by_einsum(equation: str, place: int) -> int:
    terms, arrow, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")[place]
    summed = [letter for letter in letters if letter not in result]
    if not arrow or "." in letters or len(summed) != 1 or len(set(letters)) != len(letters):
        raise _Undecided(f"einsum {equation!r} does not sum over one axis of it alone")
    return letters.index(summed[0])


def _back(operand: fx.Node, parameter: fx.Node, axis: int) -> int:
    """The axis of ``parameter`` that became ``axis`` of ``operand``."""
    node = operand
    while node is not parameter:
        name = op_name(node)
        source = next(s for s in node.all_input_nodes if _matrix_behind(s) is parameter)
        if name in ("mul", "div"):
            first = name == "mul" or node.args[0] is source
            if not first or _shape(source) != _shape(node):
                raise _Undecided(f"it is broadcast or a divisor in {name}")
        elif name not in _KEEPS_ZEROS:
            axis = _moved(node, name, len(_shape(source)), axis)
        node = source
    if axis > 1:
        raise _Undecided(f"its axis {axis} is summed over; blocks are defined along axis 0 or 1")
    return axis


def _moved(node: fx.Node, name: str, rank: int, axis: int) -> int:
    """The axis of the input of a transposition that became ``axis``."""
    order = list(range(rank))
    given: Any = node.args[1:]
    if name in ("t", "mT", "adjoint") and rank >= 2:
        order[-2:] = order[:-3:-1]
    elif name == "T":
        order.reverse()
    elif name == "transpose" and len(given) == 2:
        one, other = (int(place) % rank for place in given)
        order[one], order[other] = order[other], order[one]
    elif name == "permute" and given:
        dims = given[0] if isinstance(given[0], Sequence) else given
        order = [int(place) % rank for place in dims]
    else:
        what = "is reshaped" if name in RESHAPES else f"passes through {name}"
        raise _Undecided(f"it {what} before the product, behind which zeros may not stay in place")
    return order[axis]


def _shape(node: fx.Node) -> tuple[int, ...]:
    info: ValueInfo | None = node.meta.get("value")
    return () if info is None or info.shape is None else info.shape
