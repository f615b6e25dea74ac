# SPDX-License-Identifier: Apache-2.0
"""What values flow along an edge: spikes {0,1}, integers, scaled spikes, or analog values.

A small abstract interpretation: each value is known by the step of which it is a whole multiple, if
any, and by its range, so that ``(1 - a) * b`` of two spikes is found to be a spike again, and
``a + b`` is not.  Signals are those of eval mode (dropout passes its input through).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from spikenm_fx.trace.analysis.ops import COMPARISONS, COPIES, MOVES, RESHAPES, SELECTIONS

__all__ = ["ANALOG", "SPIKE", "Signal", "SignalKind", "join", "of_kind", "transfer"]

SignalKind = Literal["spike", "integer", "scaled", "analog"]

_MOST_LEVELS = 4096
"""A step that fits so often into the range is no scale of spikes any more (a leaky average)."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A set of values between ``low`` and ``high``: whole multiples of ``step``, or any.

    Attributes:
        integral: whether they are whole multiples of ``step``.
        low: the smallest.
        high: the largest.
        step: the scale of the spikes or counts: 1 for {0,1}, 3.7 for {0, 3.7}, 0.25 for the average
            of 4 spikes.
    """

    integral: bool
    low: float = -math.inf
    high: float = math.inf
    step: float = 1.0

    @property
    def kind(self) -> SignalKind:
        """The name of the values.

        ``"spike"`` for {0,1}, ``"integer"`` for other whole numbers, ``"scaled"`` for spikes or
        counts times a known number that is not whole, else ``"analog"``.
        """
        if not self.integral:
            return "analog"
        if not self.step.is_integer():
            return "analog" if self.levels is None else "scaled"
        return "spike" if self.low >= 0 and self.high <= 1 else "integer"

    @property
    def levels(self) -> int | None:
        """How many steps there are from the smallest to the largest value; None for too many."""
        steps = (self.high - self.low) / self.step if self.integral else math.inf
        return round(steps) if steps <= _MOST_LEVELS else None

    @property
    def is_whole(self) -> bool:
        """Whether all values are whole numbers."""
        return self.integral and self.step.is_integer()

    @property
    def is_multiple(self) -> bool:
        """Whether all values are whole multiples of a known step."""
        return self.kind != "analog"

    def __str__(self) -> str:
        return self.kind


SPIKE = Signal(True, 0.0, 1.0)
ANALOG = Signal(False)
INTEGER = Signal(True)


def of_kind(kind: SignalKind | None) -> Signal:
    """The widest signal of a kind; anything for ``"scaled"``, whose step it does not tell."""
    if kind == "spike":
        return SPIKE
    return INTEGER if kind == "integer" else ANALOG


def constant(value: float) -> Signal:
    """The signal of one number."""
    value = float(value)
    if not math.isfinite(value):
        return ANALOG
    return Signal(True, value, value, abs(value) or 1.0)


def join(signals: Sequence[Signal]) -> Signal:
    """The smallest signal that holds all of ``signals``."""
    if not signals:
        return ANALOG
    step = _common_step(signals)
    low, high = min(s.low for s in signals), max(s.high for s in signals)
    return Signal(step is not None, low, high, step or 1.0)


def _common_step(signals: Sequence[Signal]) -> float | None:
    """The step of which all values are whole multiples, where one of theirs is; else None."""
    if not all(s.integral for s in signals):
        return None
    steps = [s.step for s in signals if s.low or s.high]
    smallest = min(steps, default=1.0)
    ratios = [step / smallest for step in steps]
    fits = all(abs(ratio - round(ratio)) <= 1e-6 * ratio for ratio in ratios)
    if not fits:
        return 1.0 if all(step.is_integer() for step in steps) else None
    return smallest


def transfer(
    name: str, tensors: Sequence[Signal], operands: Sequence[Signal], node: fx.Node
) -> Signal:
    """The signal that operation ``name`` makes of its inputs' signals.

    Args:
        name: canonical name (:func:`~spikenm_fx.trace.analysis.ops.op_name`).
        tensors: of the tensor operands, in order.
        operands: of the tensor and number operands, in order.
        node: for shapes and keyword arguments.
    """
    rule = _RULES.get(name)
    if rule is not None:
        return rule(operands, node) if tensors else ANALOG
    signals = tensors
    if name in COMPARISONS:
        return SPIKE
    if name in ("upsample", "interpolate") and node.kwargs.get("mode", "nearest") == "nearest":
        return join(signals)
    if name.startswith("adaptive_avg_pool") and _pools_single_values(node):
        return join(signals)
    if "avg_pool" in name and signals:
        return _averaged(signals[0], _pooled_values(name, node))
    if "max_pool" in name or name in _KEEPING:
        return join(signals)
    return _constants(name, node)


_KEEPING = COPIES | SELECTIONS | RESHAPES | MOVES | {"identity", "channel_shuffle"}


def _pools_single_values(node: fx.Node) -> bool:
    """Whether an adaptive average pooling sees a 1x1 map: then it only copies."""
    source = node.args[0] if node.args else None
    info = source.meta.get("value") if isinstance(source, fx.Node) else None
    pooled = node.meta.get("value")
    if info is None or pooled is None or info.shape is None or pooled.shape is None:
        return False
    spatial = info.shape[-2:] if len(pooled.shape) > 3 else info.shape[-1:]
    return all(size == 1 for size in spatial)


def _pooled_values(name: str, node: fx.Node) -> float:
    """How many values one of a pooling's is the average of; infinite where that differs."""
    source = node.args[0] if node.args else None
    before, after = (_shape(n) for n in (source, node))
    if name.startswith("adaptive"):
        axes = int(name[-2])
        whole = all(not a % b for a, b in zip(before[-axes:], after[-axes:], strict=True) if b)
        return math.prod(before[-axes:]) / max(math.prod(after[-axes:]), 1) if whole else math.inf
    module = node.meta.get("module")
    given = dict(zip(_POOL_ARGUMENTS, node.args[1:], strict=False)) | node.kwargs
    kernel, _, padded, ceil, counted, divisor = (
        getattr(module, key, None) if module is not None else given.get(key, usual)
        for key, usual in _POOL_ARGUMENTS.items()
    )
    edges = any(padded) if isinstance(padded, tuple | list) else bool(padded)
    if ceil or divisor or (edges and not counted) or kernel is None:
        return math.inf
    axes = int(name[-2]) if name[-1] == "d" else 2
    return float(math.prod(kernel) if isinstance(kernel, tuple | list) else kernel**axes)


_POOL_ARGUMENTS: dict[str, Any] = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}


def _averaged(s: Signal, count: float) -> Signal:
    """An average of ``count`` values."""
    if not s.integral or not 1 <= count < math.inf:
        return Signal(False, s.low, s.high)
    return Signal(True, s.low, s.high, s.step / count)


def _constants(name: str, node: fx.Node) -> Signal:
    if name.startswith(("zeros", "new_zeros")) or name == "zero":
        return constant(0)
    if name.startswith(("ones", "new_ones", "eye")):
        return SPIKE if name == "eye" else constant(1)
    if name.startswith(("arange", "randint", "randperm")):
        info = node.meta.get("value")
        return INTEGER if info is None or not _floating(info.dtype) else ANALOG
    if name in ("full", "full_like", "new_full", "fill"):
        value = node.kwargs.get("fill_value", node.args[1] if len(node.args) > 1 else None)
        return constant(float(value)) if isinstance(value, int | float) else ANALOG
    return ANALOG


def _floating(dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype.is_floating_point


def _add(s: Sequence[Signal], node: fx.Node) -> Signal:
    alpha = node.kwargs.get("alpha", 1)
    b = _times(s[1], constant(float(alpha))) if isinstance(alpha, int | float) else ANALOG
    step = _common_step([s[0], b])
    return Signal(step is not None, s[0].low + b.low, s[0].high + b.high, step or 1.0)


def _sub(s: Sequence[Signal], node: fx.Node) -> Signal:
    return _add([s[0], _negate(s[1])], node)


def _rsub(s: Sequence[Signal], node: fx.Node) -> Signal:
    return _sub([s[1], s[0]], node)


def _negate(s: Signal) -> Signal:
    return Signal(s.integral, -s.high, -s.low, s.step)


def _times(a: Signal, b: Signal) -> Signal:
    ends = [_product(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return Signal(a.integral and b.integral, min(ends), max(ends), a.step * b.step)


def _product(x: float, y: float) -> float:
    return 0.0 if x == 0 or y == 0 else x * y


def _mul(s: Sequence[Signal], _: fx.Node) -> Signal:
    return _times(s[0], s[1]) if len(s) > 1 else ANALOG


def _div(s: Sequence[Signal], node: fx.Node) -> Signal:
    if node.kwargs.get("rounding_mode") in ("floor", "trunc"):
        return INTEGER
    known = len(s) > 1 and s[1].low == s[1].high and s[1].low
    return _times(s[0], constant(1 / s[1].low)) if known else ANALOG


def _pow(s: Sequence[Signal], node: fx.Node) -> Signal:
    exponent = node.args[1] if len(node.args) > 1 else None
    if not isinstance(exponent, int | float) or exponent < 1 or not float(exponent).is_integer():
        return ANALOG
    out = s[0]
    for _ in range(min(int(exponent), 8) - 1):
        out = _times(out, s[0])
    return out if exponent <= 8 else Signal(s[0].is_whole)


def _square(s: Sequence[Signal], _: fx.Node) -> Signal:
    squared = _times(s[0], s[0])
    return Signal(squared.integral, max(squared.low, 0.0), squared.high, squared.step)


def _abs(s: Sequence[Signal], _: fx.Node) -> Signal:
    top = max(abs(s[0].low), abs(s[0].high))
    inside = s[0].low <= 0 <= s[0].high
    low = 0.0 if inside else min(abs(s[0].low), abs(s[0].high))
    return Signal(s[0].integral, low, top, s[0].step)


def _relu(s: Sequence[Signal], _: fx.Node) -> Signal:
    return Signal(s[0].integral, max(s[0].low, 0.0), max(s[0].high, 0.0), s[0].step)


def _clamp(s: Sequence[Signal], node: fx.Node) -> Signal:
    bounds = [*node.args[1:3], None, None][:2]
    low = node.kwargs.get("min", node.kwargs.get("min_val", bounds[0]))
    high = node.kwargs.get("max", node.kwargs.get("max_val", bounds[1]))
    given = [b for b in (low, high) if b is not None]
    if not all(isinstance(b, int | float) for b in given):
        return ANALOG
    lo = s[0].low if low is None else max(s[0].low, _number(low))
    hi = s[0].high if high is None else min(s[0].high, _number(high))
    step = _common_step([s[0], *(constant(_number(b)) for b in given)])
    return Signal(step is not None, lo, hi, step or 1.0)


def _number(value: Any) -> float:
    return float(value)


def _rounded(s: Sequence[Signal], _: fx.Node) -> Signal:
    low, high = s[0].low, s[0].high
    return Signal(
        True,
        low if math.isinf(low) else math.floor(low),
        high if math.isinf(high) else math.ceil(high),
    )


def _sign(s: Sequence[Signal], _: fx.Node) -> Signal:
    return Signal(True, -1.0 if s[0].low < 0 else 0.0, 1.0 if s[0].high > 0 else 0.0)


def _sum(s: Sequence[Signal], node: fx.Node) -> Signal:
    count = _numel(node.args[0]) / max(_numel(node), 1.0) if node.args else math.inf
    if not math.isfinite(count):
        return Signal(s[0].integral, 0.0 if s[0].low >= 0 else -math.inf, math.inf, s[0].step)
    return _times(s[0], Signal(True, 0.0 if count > 1 else 1.0, count))


def _mean(s: Sequence[Signal], node: fx.Node) -> Signal:
    count = _numel(node.args[0]) / max(_numel(node), 1.0) if node.args else math.inf
    return _averaged(s[0], count)


def _numel(node: Any) -> float:
    info = node.meta.get("value") if isinstance(node, fx.Node) else None
    return math.inf if info is None or info.shape is None else float(math.prod(info.shape))


def _shape(node: Any) -> tuple[int, ...]:
    info = node.meta.get("value") if isinstance(node, fx.Node) else None
    return () if info is None or info.shape is None else tuple(info.shape)


def _matmul(s: Sequence[Signal], _: fx.Node) -> Signal:
    both = len(s) > 1 and s[0].integral and s[1].integral
    low = 0.0 if both and min(s[0].low, s[1].low) >= 0 else -math.inf
    return Signal(both, low, math.inf, s[0].step * s[1].step if both else 1.0)


def _embed_pad(s: Sequence[Signal], node: fx.Node) -> Signal:
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else 0) or 0
    return join([s[0], constant(float(value)) if isinstance(value, int | float) else ANALOG])


def _setitem(s: Sequence[Signal], node: fx.Node) -> Signal:
    return join([s[0], s[-1]])


def _where(s: Sequence[Signal], _: fx.Node) -> Signal:
    return join(s[1:]) if len(s) > 1 else SPIKE


def _masked_fill(s: Sequence[Signal], _: fx.Node) -> Signal:
    return join([s[0], *s[2:]])


def _first(s: Sequence[Signal], _: fx.Node) -> Signal:
    return s[0]


_RULES: dict[str, Callable[[Sequence[Signal], fx.Node], Signal]] = {
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "floor_divide": lambda s, n: INTEGER,
    "neg": lambda s, n: _negate(s[0]),
    "pow": _pow,
    "square": _square,
    "abs": _abs,
    "relu": _relu,
    "relu6": lambda s, n: Signal(s[0].is_whole, max(s[0].low, 0.0), min(max(s[0].high, 0.0), 6.0)),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda s, n: INTEGER if s[0].is_whole else ANALOG,
    "round": _rounded,
    "floor": _rounded,
    "ceil": _rounded,
    "trunc": _rounded,
    "sign": _sign,
    "sum": _sum,
    "mean": _mean,
    "cumsum": lambda s, n: Signal(
        s[0].integral, 0.0 if s[0].low >= 0 else -math.inf, math.inf, s[0].step
    ),
    "count_nonzero": lambda s, n: INTEGER,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "einsum": _matmul,
    "pad": _embed_pad,
    "constant_pad_nd": _embed_pad,
    "setitem": _setitem,
    "where": _where,
    "masked_fill": _masked_fill,
    "index_select": _first,
    "gather": _first,
    "getitem": _first,
    "to": _first,
    "type_as": _first,
    "expand_as": _first,
    "view_as": _first,
    "reshape_as": _first,
    "scatter_add": lambda s, n: ANALOG,
    "prod": lambda s, n: s[0] if s[0].kind == "spike" else ANALOG,
}
