# SPDX-License-Identifier: Apache-2.0
"""Products with raw parameters, ``F.conv2d(x, self.w)``: which parameter, summed along which axis.

A parameter may pass through operations before it is multiplied with data.  Those that move its
axes, or keep every zero a zero, are followed back; behind others it is tried whether a mask holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from spikenm_fx.trace.analysis.ops import MATMULS, RESHAPES, op_name
from spikenm_fx.trace.analysis.zeros import axis_of_blocks, parts_of_sum
from spikenm_fx.trace.execution.values import ValueInfo

__all__ = ["Product", "ProductFinder", "parameter_behind", "signal_products"]

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


class ProductFinder:
    """Finds the products with parameters; what it tried for one expression holds for its equals.

    A loop over time makes the same weight anew in each step: it is tried once.
    """

    def __init__(self) -> None:
        self._expressions: dict[Any, int] = {}
        self._numbers: dict[fx.Node, int] = {}
        self._tried: dict[tuple[int, int], tuple[int | None, list[fx.Node]]] = {}

    def of(self, node: fx.Node) -> list[Product]:
        """What ``node`` multiplies with, if that is made of parameters alone; else nothing.

        Several parameters where the operand holds them side by side (``torch.cat``) or adds them.
        """
        _made(node)  # in the order of the operations, so that no walk back is long
        if node.op not in ("call_function", "call_method") or op_name(node) not in MATMULS:
            return []
        operands = _operands(node)
        found = [(place, made) for place, one in enumerate(operands) if (made := _made(one))]
        found = [(place, made) for place, made in found if made.matrices]
        if not found:
            return []
        # beside a weight a state that is constant still, in the first step, is data
        place, made = min(found, key=lambda one: (one[1].made_here, -_numel(one[1].largest)))
        name = str(made.largest.target)
        try:
            axis, groups = _summed(node, operands[place], place)
        except _Undecided as reason:
            return [Product(name, None, undecided=str(reason))]
        try:
            return [Product(name, _back(operands[place], made.largest, axis), groups)]
        except _Undecided as reason:
            kept, parts = self._try(operands[place], made, axis)
            why = "" if kept is not None else str(reason)
            return [Product(str(part.target), kept, groups, why) for part in parts]

    def _try(self, operand: fx.Node, made: _Made, axis: int) -> tuple[int | None, list[fx.Node]]:
        key = (self._number(operand), axis)
        if key not in self._tried:
            parts = parts_of_sum(operand, made.matrices) or [made.largest]
            self._tried[key] = (axis_of_blocks(operand, parts, axis), parts)
        return self._tried[key]

    def _number(self, node: fx.Node) -> int:
        """The same for nodes that compute the same of the same parameters."""
        if node not in self._numbers:
            args = fx.map_arg((node.args, node.kwargs), self._number)
            key = f"{node.op} {node.target} {args}"
            self._numbers[node] = self._expressions.setdefault(key, len(self._expressions))
        return self._numbers[node]


def parameter_behind(node: fx.Node) -> str | None:
    """The matrix parameter that ``node`` is made of, if it is made of parameters only."""
    made = _made(node)
    return str(made.largest.target) if made and made.matrices else None


def signal_products(operations: fx.Graph) -> list[tuple[str, int]]:
    """Products of signals with signals, as queries with keys: of each the name and multiplications.

    They hold no weight; a step of a loop that stands for several counts for all of them.

    Args:
        operations: of a trace.
    """
    found = []
    for node in operations.nodes:
        _made(node)
        steps = 1 + int(node.meta.get("repeats", 0))
        module = node.meta.get("module")
        if isinstance(module, nn.MultiheadAttention):
            found.append(("multi_head_attention", steps * _in_module(node, module)))
        if node.op not in ("call_function", "call_method") or op_name(node) not in MATMULS:
            continue
        operands = _operands(node)
        if len(operands) > 1 and all(_made(operand) is None for operand in operands):
            found.append((op_name(node), steps * _multiplications(node, operands)))
    return found


def _in_module(node: fx.Node, module: nn.MultiheadAttention) -> int:
    given = [*node.args, *(node.kwargs[k] for k in ("query", "key") if k in node.kwargs)]
    query, key = (_shape(operand) for operand in given[:2] if isinstance(operand, fx.Node))
    keys = key[1 if module.batch_first and len(key) == 3 else 0]
    return 2 * math.prod(query[:-1]) * keys * int(module.embed_dim)


def _multiplications(node: fx.Node, operands: list[fx.Node]) -> int:
    name, shapes = op_name(node), [_shape(operand) for operand in operands]
    if name == "einsum":
        terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
        sizes = {
            letter: size
            for term, shape in zip(terms, shapes, strict=False)
            for letter, size in zip(term, shape, strict=False)
        }
        return math.prod(sizes.values())
    if name == "scaled_dot_product_attention":  # queries with keys, and what they weigh with values
        query, keys, values = shapes[0], shapes[1][-2], shapes[2][-1]
        return math.prod(query[:-1]) * keys * (query[-1] + values)
    summed = shapes[1][1:] if name.startswith("conv") else shapes[0][-1:]
    return math.prod(_shape(node)) * math.prod(summed)


@dataclass(frozen=True, slots=True)
class _Made:
    """What a node that reads no data is made of: parameters of two axes or more, and constants."""

    matrices: tuple[fx.Node, ...] = ()
    made_here: bool = False

    @property
    def largest(self) -> fx.Node:
        return max(self.matrices, key=_numel)


def _numel(parameter: fx.Node) -> int:
    return int(parameter.meta["tensor"].numel())


def _made(node: fx.Node) -> _Made | None:
    """What ``node`` is made of; None where that is data."""
    if "made" not in node.meta:
        node.meta["made"] = _read_made(node)
    found: _Made | None = node.meta["made"]
    return found


def _read_made(node: fx.Node) -> _Made | None:
    if node.op in ("placeholder", "call_module", "output"):
        return None
    if node.op == "get_attr":
        matrix = len(_shape(node)) >= 2 and isinstance(node.meta.get("tensor"), nn.Parameter)
        return _Made((node,) if matrix else ())
    parts = [_made(source) for source in node.all_input_nodes]
    known = [part for part in parts if part is not None]
    # a constant made in the forward (torch.arange); a product with one is a first state's
    made_here = not parts or any(part.made_here for part in known)
    if len(known) < len(parts) or (made_here and op_name(node) in MATMULS):
        return None
    matrices = dict.fromkeys(matrix for part in known for matrix in part.matrices)
    return _Made(tuple(matrices), made_here)


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
        source = next(s for s in node.all_input_nodes if _is_behind(parameter, s))
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


def _is_behind(parameter: fx.Node, node: fx.Node) -> bool:
    made = _made(node)
    return made is not None and parameter in made.matrices


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
