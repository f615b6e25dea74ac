# SPDX-License-Identifier: Apache-2.0
"""The report's figures as inline SVG: no fonts, scripts or files from elsewhere.

Colours are CSS classes of the page (:mod:`spikenm_fx.report.render.html`), so that one drawing
serves light and dark.  Blue is weights, orange is spikes, green is what is left of the work, grey
what was there before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from spikenm_fx.report.data import LayerReport, ReportData
from spikenm_fx.report.render.units import count_text, percent

__all__ = ["latency_chart", "layers_chart", "mask_tiles", "neurons_chart", "waterfall"]

_WIDTH = 860
_TILES = 6  # masks drawn at most
_MARGIN = 58  # room for "100.0%" behind the longest bar


def waterfall(report: ReportData) -> str:
    """Products per sample: of dense layers, with weight zeros, and with silent inputs too."""
    total, samples = report.operations, max(report.samples, 1)
    left, scale = 130, (_WIDTH - 130 - 230) / max(total.dense, 1)
    steps = (
        ("dense", total.dense, "grey", "every input meets every weight"),
        ("weight-sparse", total.weight_sparse, "weight", "only the weights that are not zero"),
        ("dual-sparse", total.effective, "done", "only spikes that meet such a weight"),
    )
    parts, y, before = [], 14, None
    for name, value, colour, hint in steps:
        width = value * scale
        if before is not None:
            parts.append(_line(left + before * scale, y - 18, left + before * scale, y + 34))
            parts.append(_box(left + width, y, (before - value) * scale, 34, "ghost"))
        parts.append(_box(left, y, max(width, 1), 34, colour, f"{name}: {value / samples:,.0f}"))
        if name == "dual-sparse" and total.macs:
            parts.append(_box(left, y, max(total.macs * scale, 1), 34, "mac", "MACs (analog)"))
        parts.append(_text(left - 14, y + 15, name, "end strong"))
        parts.append(_text(left - 14, y + 30, count_text(value / samples), "end soft"))
        edge = left + max(value, before or 0) * scale
        factor = f"{total.dense / value:.1f}x fewer" if before is not None and value else ""
        parts.append(_text(edge + 12, y + 15, factor or hint, "strong" if factor else "soft"))
        if factor:
            parts.append(_text(edge + 12, y + 30, hint, "soft"))
        y, before = y + 52, value
    return _svg(_WIDTH, y, parts, "Operations per sample: dense, weight-sparse, dual-sparse")


def layers_chart(report: ReportData) -> str:
    """Density, firing rate and remaining work of each layer, side by side."""
    rows = report.layers
    names = min(max((len(layer.name) for layer in rows), default=4), 30)
    left = 18 + 7.4 * names
    gap, step, top = 46.0, 24, 46
    panel = (_WIDTH - left - 2 * gap - _MARGIN) / 3
    x_density, x_rate, x_work = left, left + panel + gap, left + 2 * (panel + gap)
    most = max((layer.operations.dense for layer in rows), default=1) or 1
    peak = _axis_top(max((r for layer in rows for r in _rates(layer)), default=1.0))
    bottom = top + step * len(rows)
    bands = [_box(0, top + step * i, _WIDTH, step, "band") for i in range(1, len(rows), 2)]
    parts = [
        *bands,
        *_axis(x_density, panel, top, bottom, "weight density", 1.0),
        *_axis(x_rate, panel, top, bottom, "firing rate", peak),
        _text(x_work, 16, "work left of the dense work", "strong"),
        _text(x_work, 34, f"full width = {count_text(most / max(report.samples, 1))}", "tick"),
    ]
    for index, layer in enumerate(rows):
        y = top + step * index
        parts.append(_text(left - 12, y + 16, _shorten(layer.name or "(root)", 30), "end name"))
        parts += _density_bar(layer, x_density, y, panel)
        parts += _rate_bar(layer, x_rate, y, panel, peak)
        parts += _work_bar(layer, x_work, y, panel, most, max(report.samples, 1))
    return _svg(_WIDTH, bottom + 8, parts, "Density, firing rate and work by layer")


def mask_tiles(report: ReportData) -> str:
    """Corners of the masks of the sparse layers, with how their blocks are filled."""
    chosen = _spread([la for la in report.layers if la.pattern and la.tile], _TILES)
    if not chosen:
        return ""
    cell, columns = 6.4, 2
    width = _WIDTH / columns
    height = max(len(layer.tile.rows) for layer in chosen if layer.tile) * cell + 92
    parts = []
    for index, layer in enumerate(chosen):
        x, y = (index % columns) * width, (index // columns) * height
        parts.append(_text(x, y + 16, _shorten(layer.name, 30), "name strong"))
        parts.append(_text(x, y + 32, _tile_caption(layer), "soft"))
        parts += _tile(layer, x, y + 42, cell)
        drawn = len(layer.tile.rows) if layer.tile else 0
        parts += _fill_bar(layer, x, y + 42 + drawn * cell + 10, width - 30)
    rows = -(-len(chosen) // columns)
    return _svg(_WIDTH, rows * height, parts, "Structure of the masks")


def neurons_chart(report: ReportData) -> str:
    """Firing rate of each neuron layer, and the share that never fired."""
    rows = report.neurons
    if not rows:
        return ""
    left = 18 + 7.4 * min(max(len(n.name) for n in rows), 34)
    panel, step, top = (_WIDTH - left - 110) / 2, 22, 42
    peak = _axis_top(max(n.rate for n in rows))
    bottom = top + step * len(rows)
    x_silent = left + panel + 56
    parts = [
        *_axis(left, panel, top, bottom, "firing rate", peak),
        *_axis(x_silent, panel, top, bottom, "neurons that never fired", 1.0),
    ]
    for index, neuron in enumerate(rows):
        y = top + step * index
        parts.append(_text(left - 12, y + 15, _shorten(neuron.name, 34), "end name"))
        parts.append(_box(left, y + 5, panel * neuron.rate / peak, 12, "spike", ""))
        parts.append(_text(left + panel * neuron.rate / peak + 6, y + 15, percent(neuron.rate)))
        if neuron.silent is not None:
            parts.append(_box(x_silent, y + 5, panel * neuron.silent, 12, "grey", ""))
            label = percent(neuron.silent)
            parts.append(_text(x_silent + panel * neuron.silent + 6, y + 15, label))
    return _svg(_WIDTH, bottom + 8, parts, "Firing of the neuron layers")


def latency_chart(report: ReportData) -> str:
    """Measured time of one batch, per variant."""
    if report.latency is None:
        return ""
    total = report.latency.total
    most, left, step = max(total.values()) or 1.0, 130, 34
    parts = []
    for index, (name, seconds) in enumerate(total.items()):
        y = 8 + step * index
        width = (_WIDTH - left - 230) * seconds / most
        parts.append(_text(left - 14, y + 17, name, "end strong"))
        parts.append(_box(left, y, width, 24, "grey" if index == 0 else "done"))
        first = next(iter(total.values()))
        gain = f"  ({first / seconds:.2f}x)" if index and seconds else ""
        parts.append(_text(left + width + 10, y + 17, f"{1000 * seconds:.2f} ms{gain}", "strong"))
    return _svg(_WIDTH, 12 + step * len(total), parts, "Latency of one batch")


def _density_bar(layer: LayerReport, x: float, y: float, panel: float) -> list[str]:
    colour = "weight" if layer.pattern else "grey"
    label = f"{layer.pattern or 'dense'}, {percent(layer.density)}"
    width = panel * layer.density
    colours = "end inside" if layer.pattern else "end"
    text_x, place = (x + width + 6, "") if layer.density < 0.7 else (x + width - 6, colours)
    return [
        _box(x, y + 5, max(width, 1), 14, colour, label),
        _text(text_x, y + 16, layer.pattern or "dense", place),
    ]


def _rate_bar(layer: LayerReport, x: float, y: float, panel: float, peak: float) -> list[str]:
    ends = [panel * min(rate / peak, 1.0) for rate in _rates(layer)]
    label = percent(layer.rate_in) if layer.rate_in is not None else layer.signal or "never ran"
    parts = []
    if layer.rate_in is not None:
        parts.append(_box(x, y + 5, max(ends[0], 1), 14, "spike", f"in: {label}"))
    if layer.rate_out is not None:
        title = f"<title>out: {percent(layer.rate_out)}</title>"
        cx, cy = x + ends[-1], y + 12
        parts.append(f'<circle class="ring" cx="{cx:.1f}" cy="{cy:.1f}" r="4.5">{title}</circle>')
    return [*parts, _text(x + max([*ends, -2]) + 12, y + 16, label, "tick")]


def _work_bar(
    layer: LayerReport, x: float, y: float, panel: float, most: int, samples: int
) -> list[str]:
    done = layer.operations
    parts = []
    for name, value, colour, height in (
        ("dense", done.dense, "grey", 16),
        ("weight-sparse", done.weight_sparse, "weight", 11),
        ("MACs" if done.macs else "SynOps", done.effective, "mac" if done.macs else "done", 6),
    ):
        title = f"{name}: {value / samples:,.0f} per sample"
        parts.append(
            _box(x, y + 12 - height / 2, max(panel * value / most, 0.8), height, colour, title)
        )
    label = percent(done.effective / done.dense) if done.dense else "-"
    parts.append(_text(x + panel * done.dense / most + 8, y + 16, label, "tick"))
    return parts


def _tile(layer: LayerReport, x: float, y: float, cell: float) -> list[str]:
    tile = layer.tile
    if tile is None or not tile.rows:
        return []
    columns, gap = len(tile.rows[0]), 1.2
    side = cell - gap
    back: list[str] = []
    path: list[str] = []
    for r, row in enumerate(tile.rows):
        for c, bit in enumerate(row):
            move = f"M{x + c * cell:.1f} {y + r * cell:.1f}h{side:.1f}v{side:.1f}h-{side:.1f}z"
            (path if bit == "1" else back).append(move)
    height = len(tile.rows) * cell
    borders = "".join(
        f"M{x + c * cell - gap / 2:.1f} {y:.1f}v{height:.1f}"
        for c in range(tile.of, columns, tile.of)
    )
    return [
        f'<path class="empty" d="{"".join(back)}"/>',
        f'<path class="weight" d="{"".join(path)}"/>',
        f'<path class="border" d="{borders}"/>' if borders else "",
    ]


def _fill_bar(layer: LayerReport, x: float, y: float, width: float) -> list[str]:
    """One bar cut by how many non-zeros the blocks hold."""
    total = sum(layer.blocks)
    if not total:
        return []
    parts, at = [], x
    filled = [(held, n) for held, n in enumerate(layer.blocks) if n]
    for held, n in filled:
        part = width * n / total
        title = f"{n:,} of {total:,} blocks hold {held}"
        opacity = 0.25 + 0.75 * held / max(filled[-1][0], 1)
        parts.append(
            f'<rect class="weight" x="{at:.1f}" y="{y:.1f}" width="{part:.1f}" height="10" '
            f'opacity="{opacity:.2f}"><title>{title}</title></rect>'
        )
        at += part
    most, share = max(filled, key=lambda item: item[1])
    text = f"{percent(share / total)} of blocks hold {most}"
    parts.append(_text(x, y + 24, text, "tick"))
    return parts


def _tile_caption(layer: LayerReport) -> str:
    kept = f", keeps {percent(layer.kept_magnitude)} of |w|" if layer.kept_magnitude else ""
    return f"{layer.pattern}{kept}"


def _rates(layer: LayerReport) -> Iterable[float]:
    return (rate for rate in (layer.rate_in, layer.rate_out) if rate is not None)


def _axis_top(value: float) -> float:
    """A round number with room for a label behind a bar of ``value``."""
    tops = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
    return next((top for top in tops if value <= 0.85 * top), max(value, 1.0))


def _axis(x: float, width: float, top: float, bottom: float, title: str, peak: float) -> list[str]:
    parts = [_text(x, 16, title, "strong")]
    for share in (0.0, 0.5, 1.0):
        at = x + width * share
        parts.append(_line(at, top - 4, at, bottom))
        parts.append(
            _text(at, top - 10, percent(peak * share, 0 if peak >= 0.1 else 1), "mid tick")
        )
    return parts


def _spread(items: Sequence[LayerReport], count: int) -> list[LayerReport]:
    """``count`` of the items, evenly from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else "..." + name[-(length - 3) :]


def _svg(width: float, height: float, parts: Iterable[str], label: str) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def _box(
    x: float, y: float, width: float, height: float, colour: str, title: str | None = None
) -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{colour}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" '
        f'height="{height:.1f}" rx="2">{inner}</rect>'
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, classes: str = "") -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
