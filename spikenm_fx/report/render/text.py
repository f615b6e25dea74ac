# SPDX-License-Identifier: Apache-2.0
"""A report as a table for terminals and logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from spikenm_fx.report.data import LayerReport, Report

__all__ = ["bytes_text", "count_text", "counted", "energy_text", "percent", "table"]


def percent(value: float | None, digits: int = 1) -> str:
    """``0.1234`` as ``12.3%``; a dash where there is no value."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def count_text(value: float, unit: str = "") -> str:
    """``1234567`` as ``1.23M``, with ``unit`` behind."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"


def energy_text(picojoule: float) -> str:
    """Picojoule in the unit people read: pJ, nJ, uJ, mJ."""
    for size, unit in ((1e9, "mJ"), (1e6, "uJ"), (1e3, "nJ")):
        if picojoule >= size:
            return f"{picojoule / size:.3g} {unit}"
    return f"{picojoule:.3g} pJ"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``1 thread``, ``4 threads``, ``2 batches``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def bytes_text(count: float) -> str:
    """Bytes in KiB or MiB."""
    for size, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


_COLUMNS: tuple[tuple[str, Callable[[LayerReport, int], str]], ...] = (
    ("layer", lambda layer, _: layer.name or "(root)"),
    ("kind", lambda layer, _: layer.kind),
    ("weight", lambda layer, _: "x".join(map(str, layer.shape))),
    ("pattern", lambda layer, _: layer.pattern or "dense"),
    ("density", lambda layer, _: percent(layer.density)),
    ("kept |w|", lambda layer, _: percent(layer.kept_magnitude)),
    ("input", lambda layer, _: layer.signal or "never ran"),
    ("rate in", lambda layer, _: percent(layer.rate_in)),
    ("rate out", lambda layer, _: percent(layer.rate_out)),
    ("dense ops", lambda layer, n: count_text(layer.operations.dense / n)),
    ("SynOps", lambda layer, n: count_text(layer.operations.synops / n)),
    ("MACs", lambda layer, n: count_text(layer.operations.macs / n)),
    ("energy", lambda layer, n: energy_text(layer.picojoule / n)),
    ("dual sp.", lambda layer, _: percent(layer.dual_sparsity)),
    ("PE util.", lambda layer, _: percent(layer.utilisation)),
    ("bytes", lambda layer, _: bytes_text(layer.packed_bytes)),
)
_LEFT = 4


def table(report: Report) -> str:
    """The report as text: a head line, one row per layer, the totals."""
    samples = max(report.samples, 1)
    rows = [[name for name, _ in _COLUMNS]]
    rows += [[cell(layer, samples) for _, cell in _COLUMNS] for layer in report.layers]
    rows.append(_total_row(report, samples))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(_align(cell, widths[i], i) for i, cell in enumerate(row)) for row in rows]
    rule = "-" * len(lines[0])
    body = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    return "\n".join([_head(report), *(line.rstrip() for line in body), *_foot(report)])


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < _LEFT else cell.rjust(width)


def _head(report: Report) -> str:
    return (
        f"{report.model}: {sum(layer.pattern is not None for layer in report.layers)} of "
        f"{len(report.layers)} weight layers are N:M; "
        f"{counted(report.samples, 'sample')} in {counted(report.batches, 'batch', 'batches')}; "
        f"operations and energy per sample"
    )


def _total_row(report: Report, samples: int) -> list[str]:
    total = report.operations
    return [
        "total",
        "",
        count_text(sum(layer.weights for layer in report.layers)),
        "",
        percent(report.density),
        "",
        "",
        percent(report.firing_rate),
        "",
        count_text(total.dense / samples),
        count_text(total.synops / samples),
        count_text(total.macs / samples),
        energy_text(report.picojoule),
        percent(report.dual_sparsity),
        percent(report.utilisation),
        bytes_text(report.packed_bytes),
    ]


def _foot(report: Report) -> list[str]:
    energy = report.energy
    lines = [
        f"energy: {energy.pj_per_ac:g} pJ per AC, {energy.pj_per_mac:g} pJ per MAC (weight layers "
        f"only); with dense weights {energy_text(report.picojoule_dense)}, "
        f"all MACs {energy_text(report.picojoule_ann)}",
        f"bytes: {bytes_text(report.dense_bytes)} dense, "
        f"{bytes_text(report.packed_bytes)} packed; PE utilisation for {report.pes} PEs",
    ]
    ways = Counter(la.note.removeprefix("runs as ") for la in report.layers if "runs as" in la.note)
    if ways:
        lines.append("packed layers run as: " + ", ".join(f"{n} {way}" for way, n in ways.items()))
    if report.latency is not None:
        times = ", ".join(f"{k} {1000 * v:.2f} ms" for k, v in report.latency.total.items())
        lines.append(
            f"latency of one batch: {times} (median of {report.latency.repeats}, "
            f"{counted(report.latency.threads, 'thread')})"
        )
    return [*lines, *(f"note: {note}" for note in report.notes)]
