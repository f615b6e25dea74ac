# SPDX-License-Identifier: Apache-2.0
"""The verb ``export.semi_structured``: a folded 2:4 model on NVIDIA's sparse tensor cores."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import ExportError, some_of
from spikenm_fx.export.ready import at_rest, refuse_unready
from spikenm_fx.export.semi_layer import SemiStructured, why_dense
from spikenm_fx.export.semi_layout import MULTIPLES
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.state import reset_to_rest
from spikenm_fx.table import text_table
from spikenm_fx.trace import trace

__all__ = ["NOT_MEASURED", "SemiReport", "SemiRow", "semi_report", "semi_structured"]

NOT_MEASURED = "not measured: no CUDA device"
_KEY = "_spikenm_semi_structured"
_MOST = 0.02
"""Largest difference to the dense layer, over its largest output, that rounding explains."""


@dataclass(frozen=True, slots=True)
class SemiRow:
    """What became of one layer.

    Attributes:
        name: of the layer.
        shape: of its weight.
        sparse: whether it runs on sparse tensor cores.
        why: why not; "" where it does.
        dense_ms: of the dense layer in the same dtype, median; None where nothing was measured.
        sparse_ms: of the sparse one.
        largest_difference: between their outputs, over the largest output.
    """

    name: str
    shape: tuple[int, ...]
    sparse: bool
    why: str = ""
    dense_ms: float | None = None
    sparse_ms: float | None = None
    largest_difference: float | None = None


@dataclass(frozen=True, slots=True)
class SemiReport:
    """All layers of a model that :func:`semi_structured` made.

    Attributes:
        dtype: of the products.
        rows: one for each layer.
        measured: on which device; or that nothing was.
    """

    dtype: str
    rows: tuple[SemiRow, ...]
    measured: str

    def __str__(self) -> str:
        table = [("layer", "weight", "runs", "dense ms", "sparse ms", "difference")]
        table += [
            (
                row.name,
                "x".join(map(str, row.shape)),
                "2:4" if row.sparse else f"dense: {row.why}",
                _number(row.dense_ms),
                _number(row.sparse_ms),
                _number(row.largest_difference),
            )
            for row in self.rows
        ]
        count = sum(row.sparse for row in self.rows)
        head = f"{count} of {len(self.rows)} layers are 2:4 in {self.dtype}; {self.measured}"
        return "\n".join([head, *text_table(table)])


def semi_structured(
    model: nn.Module,
    x: Any = None,
    *,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device | None = None,
) -> nn.Module:
    """A copy of ``model`` whose 2:4 layers multiply on NVIDIA's sparse tensor cores.

    Linear layers and ungrouped convolutions are products of their rows, time and batch merged, with
    a 2:4 matrix, padded to the vendor's multiples.  Each weight is counted first: torch's own
    conversion drops the third non-zero of a block.  What is not 2:4 stays dense, and so does what
    does not pay: with ``x`` on a CUDA device both forms of each layer take turns on the layer's own
    inputs, and the faster one stays.  :func:`semi_report` says what became of each layer.

    Products are computed in ``dtype`` and accumulated by the device; spikes are exact in all three,
    weights are rounded once.  int8 scales each row by its largest weight, and takes layers whose
    inputs are spikes or counts by the trace; others stay dense.

    Args:
        model: folded, in float32; it is not changed.
        x: example inputs where the model is, to measure and, for int8, to trace with; None: every
            2:4 layer becomes sparse.
        dtype: ``torch.float16``, ``torch.bfloat16`` or ``torch.int8``.
        device: where the copy goes; None: where the model is.  Elsewhere than on CUDA the
            compressed weights are expanded again, for tests.

    Returns:
        The copy, in eval mode.

    Raises:
        ExportError: for float32, which is 1:2 there; for int8 without ``x``; if the model is not
            folded; if none of its layers can run so.
        TraceError: if the model cannot run on ``x``.
    """
    if dtype not in MULTIPLES:
        raise ExportError(
            f"dtype {dtype}: sparse tensor cores take 2:4 in float16, bfloat16 and int8; in "
            "float32 they take 1:2, which would lose half of a 2:4 weight: name one of the three"
        )
    if dtype == torch.int8 and x is None:
        raise ExportError(
            "int8 is for layers that see spikes or counts, which a trace tells: give example "
            "inputs, semi_structured(model, x, dtype=torch.int8)"
        )
    refuse_unready(model, "export.semi_structured", dtypes=(torch.float32,))
    copied = at_rest(model, "export.semi_structured")
    if device is not None:
        copied = copied.to(device)
    layers = {n: m for n, m in nn.Module.named_modules(copied) if is_weight_layer(m)}
    reasons = {name: why_dense(layer) for name, layer in layers.items()}
    if dtype == torch.int8:
        reasons |= _analog(copied, x, [name for name, why in reasons.items() if not why])
    if all(reasons.values()):
        listed = some_of(f"{name}: {why}" for name, why in reasons.items())
        raise ExportError(
            f"no layer of {type(model).__name__} is 2:4 ({listed}); sparsify(model, '2:4'), train "
            "and fold it first"
        )
    inputs = _inputs(copied, layers, x) if x is not None and _on_cuda(copied) else {}
    rows = []
    for name, layer in layers.items():
        shape = tuple(layer.weight.shape)
        if reasons[name]:
            rows.append(SemiRow(name, shape, False, reasons[name]))
            continue
        made = SemiStructured(layer, dtype, name).to(layer.weight.device)
        row = SemiRow(name, shape, True)
        if name in inputs:
            row = _measured(row, layer, made, inputs[name], dtype)
        if row.sparse:
            _put(copied, name, made)
        rows.append(row)
    where = _where(copied) if inputs else NOT_MEASURED
    if not inputs and _on_cuda(copied):
        where = "not measured: no example inputs"
    kind = str(dtype).removeprefix("torch.")
    copied.__dict__[_KEY] = SemiReport(kind, tuple(rows), where)
    return copied


def semi_report(model: nn.Module) -> SemiReport:
    """What became of each layer.

    Raises:
        ExportError: for a model that :func:`semi_structured` did not make.
    """
    report = model.__dict__.get(_KEY)
    if not isinstance(report, SemiReport):
        raise ExportError(f"this {type(model).__name__} was not made by export.semi_structured")
    return report


def _put(model: nn.Module, name: str, made: nn.Module) -> None:
    if not name:
        raise ExportError("the model is one layer; put it into an nn.Sequential")
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, made)


def _on_cuda(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


def _where(model: nn.Module) -> str:
    device = next(p.device for p in model.parameters() if p.is_cuda)
    return f"measured on {torch.cuda.get_device_name(device)}"


def _analog(model: nn.Module, x: Any, names: list[str]) -> dict[str, str]:
    """Layers whose inputs are no whole numbers: int8 would round them."""
    graph = trace(model, x)
    found = {}
    for name in names:
        record = graph.record(name)
        kind = record.input_signal.kind if record and record.input_signal else "unknown"
        if kind not in ("spike", "integer"):
            found[name] = f"its input is {kind}, which int8 would round"
    return found


def _inputs(model: nn.Module, layers: dict[str, nn.Module], x: Any) -> dict[str, Tensor]:
    """What each layer sees in its first call."""
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, args[0].detach())

        return hook

    handles = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(*(x if isinstance(x, tuple) else (x,)))
    finally:
        for handle in handles:
            handle.remove()
    reset_to_rest(model)
    return seen


def _measured(
    row: SemiRow, layer: nn.Module, made: nn.Module, x: Tensor, dtype: torch.dtype
) -> SemiRow:
    """Dense and sparse in turn; the dense layer in the half precision that it would get."""
    half = torch.float16 if dtype == torch.int8 else dtype
    dense = copy.deepcopy(layer).to(half)
    given = x.to(half)
    with torch.no_grad():
        wanted, got = dense(given).float(), made(x).float()
        scale = wanted.abs().max().clamp_min(1e-12)
        difference = float((wanted - got).abs().max() / scale)
        times = _in_turn({"dense": lambda: dense(given), "sparse": lambda: made(given)})
    paid = times["sparse"] < times["dense"]
    why = "" if paid else "does not pay"
    if not difference < _MOST:
        why = f"computes something else on this device (by {difference:.2g})"
    return replace(
        row,
        sparse=not why,
        why=why,
        dense_ms=times["dense"],
        sparse_ms=times["sparse"],
        largest_difference=difference,
    )


def _in_turn(runs: dict[str, Callable[[], Any]], repeats: int = 20) -> dict[str, float]:
    """Median milliseconds by the device's own clock."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 3):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
