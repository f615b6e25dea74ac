# SPDX-License-Identifier: Apache-2.0
"""A report as one self-contained page: style and figures inline, no scripts, no network."""

from __future__ import annotations

from html import escape

from spikenm_fx.report.data import LatencyReport, ReportData
from spikenm_fx.report.render.charts import (
    latency_chart,
    layers_chart,
    mask_tiles,
    neurons_chart,
    waterfall,
)
from spikenm_fx.report.render.columns import COLUMNS, rows
from spikenm_fx.report.render.style import STYLE, document, styled_table
from spikenm_fx.report.render.units import bytes_text, count_text, counted, energy_text, percent

__all__ = ["fragment", "page"]

_WEIGHTS = ("layer", "weight", "pattern", "density", "kept |w|", "PE util.", "bytes", "packed")
_WORK = (
    "layer", "input", "rate in", "rate out", "dense ops", "SynOps", "MACs", "energy",
    "dual sparsity",
)  # fmt: skip


def page(report: ReportData) -> str:
    """A complete HTML document."""
    return document(f"{report.model}: N:M sparsity report", fragment(report))


def fragment(report: ReportData) -> str:
    """The page's body with its own style, for notebooks and other pages."""
    sections = [
        _section(
            "Work per inference",
            "Products of inputs and weights, per sample. Zeros in weights and silent inputs both "
            "remove work, and they multiply.",
            waterfall(report),
        ),
        _section(
            "Layer by layer",
            "Where the zeros are, how much fires, and what is left to do. "
            "The percentage at the right is the share of dense work that remains.",
            _legend() + layers_chart(report),
        ),
        _section(
            "Mask structure",
            "A corner of each mask at the kernel's centre: rows are output channels, columns are "
            "input channels, lines are block borders.",
            mask_tiles(report),
        ),
        _section("Neurons", "Mean spikes per neuron and step.", neurons_chart(report)),
        _section("Latency", _latency_words(report), latency_chart(report)),
        _section("All figures", "Counts and energy are per sample.", _tables(report)),
        _section("What the words mean", "Of the columns above, from left to right.", _meanings()),
    ]
    return (
        f'<div class="snm"><style>{STYLE}</style><h1>{escape(report.model)}</h1>'
        f"<p>{_subtitle(report)}</p>{_tiles(report)}{''.join(sections)}{_footer(report)}</div>"
    )


def _energy(picojoule: float) -> str:
    return energy_text(picojoule).replace("uJ", "\N{MICRO SIGN}J")


def _section(title: str, words: str, body: str) -> str:
    figure = f'<div class="figure">{body}</div>'
    return f"<h2>{title}</h2><p>{words}</p>{figure}" if body else ""


def _subtitle(report: ReportData) -> str:
    patterns = sorted({layer.pattern for layer in report.layers if layer.pattern})
    sparse = sum(layer.pattern is not None for layer in report.layers)
    shown = f" ({', '.join(patterns)})" if patterns else ""
    return (
        f"{sparse} of {len(report.layers)} weight layers are N:M{shown}. Measured on "
        f"{counted(report.samples, 'sample')} in {counted(report.batches, 'batch', 'batches')}."
    )


def _tiles(report: ReportData) -> str:
    total, samples = report.operations, max(report.samples, 1)
    fewer = f"{total.dense / total.effective:.1f}x" if total.effective else "-"
    saved = (
        f"{report.picojoule_dense / report.picojoule:.2f}x less than with dense weights"
        if report.picojoule
        else ""
    )
    smaller = report.dense_bytes / report.packed_bytes if report.packed_bytes else 1.0
    tiles = (
        ("fewer operations", fewer, f"{count_text(total.effective / samples)} left per sample"),
        ("weight density", percent(report.density), "share of weights that are not zero"),
        ("firing rate", percent(report.firing_rate), "mean over layers that see spikes"),
        ("energy per sample", _energy(report.picojoule), saved),
        ("weights packed", bytes_text(report.packed_bytes), f"{smaller:.2f}x smaller than dense"),
        (
            "PE utilisation",
            percent(report.utilisation),
            f"mean over maximum work of {report.pes} processing elements",
        ),
    )
    cells = "".join(
        f'<div class="tile"><em>{escape(name)}</em><b>{escape(value)}</b>'
        f"<span>{escape(words)}</span></div>"
        for name, value, words in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _legend() -> str:
    entries = (
        ("grey", "dense"),
        ("weight", "weights kept"),
        ("spike", "spikes: bar, firing rate of the input; ring, of the neurons behind"),
        ("done", "SynOps left"),
        ("mac", "MACs left (analog input)"),
    )
    items = "".join(
        f'<span><i style="background:var(--{colour})"></i>{words}</span>'
        for colour, words in entries
    )
    return f'<div class="legend">{items}</div>'


def _latency_words(report: ReportData) -> str:
    if report.latency is None:
        return ""
    return (
        f"One batch on this machine, median of {report.latency.repeats} interleaved forwards, "
        f"{counted(report.latency.threads, 'thread')}."
    )


def _tables(report: ReportData) -> str:
    """All figures, as tables that a narrow window can show."""
    meanings = {head: column.meaning for head, column in COLUMNS.items()}
    notes = ["; ".join(filter(None, (la.reason, la.note))) for la in report.layers] + [""]
    tables = [rows(report, _WEIGHTS), rows(report, _WORK)]
    if report.latency is not None:
        tables.append(_latencies(report, report.latency))
    return "".join(
        styled_table(cells, heads=meanings, rows_say=notes, totals=True) for cells in tables
    )


def _latencies(report: ReportData, times: LatencyReport) -> list[list[str]]:
    """Milliseconds of each layer for one batch, by variant."""
    found = [["layer", *(f"{name}, ms" for name in times.total)]]
    for name in (layer.name for layer in report.layers):
        measured = times.layers.get(name, {})
        cells = [f"{1000 * measured[v]:.3f}" if v in measured else "-" for v in times.total]
        found.append([name or "(root)", *cells])
    return [*found, ["total", *(f"{1000 * s:.3f}" for s in times.total.values())]]


def _meanings() -> str:
    terms = (
        f"<dt>{escape(column.head)}</dt><dd>{escape(column.meaning)}</dd>"
        for column in COLUMNS.values()
        if column.meaning
    )
    return f"<dl>{''.join(terms)}</dl>"


def _footer(report: ReportData) -> str:
    energy = report.energy
    lines = [
        f"Energy: {energy.pj_per_ac:g} pJ per accumulation, {energy.pj_per_mac:g} pJ per "
        "multiply-accumulate, weight layers only. "
        f"With dense weights {_energy(report.picojoule_dense)}, with every product a MAC "
        f"{_energy(report.picojoule_ann)} per sample.",
        "SynOps are exact: each spike that meets a non-zero weight counts once; zeros that a "
        "convolution pads with count nothing.",
        *report.notes,
    ]
    return "<footer>" + "<br>".join(escape(line) for line in lines) + "</footer>"
