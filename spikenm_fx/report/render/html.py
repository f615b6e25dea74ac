# SPDX-License-Identifier: Apache-2.0
"""A report as one self-contained page: style and figures inline, no scripts, no network."""

from __future__ import annotations

from html import escape

from spikenm_fx.report.data import LayerReport, Report
from spikenm_fx.report.render.charts import (
    latency_chart,
    layers_chart,
    mask_tiles,
    neurons_chart,
    waterfall,
)
from spikenm_fx.report.render.text import bytes_text, count_text, counted, energy_text, percent

__all__ = ["fragment", "page"]

_STYLE = """
.snm{--bg:#fff;--ink:#1b2330;--soft:#667085;--line:#e4e8ee;--band:#f7f9fb;--grey:#cfd6df;
--ghost:#eef1f5;--weight:#2b6cb0;--spike:#e08a1e;--done:#12936f;--mac:#8e5bbf;--card:#f7f9fb;
background:var(--bg);color:var(--ink);max-width:1200px;margin:0 auto;padding:28px 32px 40px;
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media(prefers-color-scheme:dark){.snm{--bg:#12161d;--ink:#e7ebf1;--soft:#98a3b3;--line:#2a323e;
--band:#181e27;--grey:#46505f;--ghost:#1d242e;--weight:#5b9be0;--spike:#f0a544;--done:#35bd95;
--mac:#b48ae0;--card:#1a212b}}
.snm h1{font-size:25px;margin:0 0 2px;letter-spacing:-.01em}
.snm h2{font-size:17px;margin:38px 0 4px}
.snm p{margin:0 0 12px;color:var(--soft)}
.snm .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));gap:12px;
margin:20px 0 4px}
.snm .tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.snm .tile b{display:block;font-size:23px;white-space:nowrap;letter-spacing:-.02em;font-weight:650}
.snm .tile span{display:block;color:var(--soft);font-size:12.5px}
.snm .tile em{font-style:normal;font-size:13px}
.snm .figure{overflow-x:auto}
.snm svg{width:100%;min-width:680px;height:auto;display:block;font-family:inherit}
.snm svg text{font-size:12.5px;fill:var(--ink)}
.snm svg .strong{font-weight:600}.snm svg .soft,.snm svg .tick{fill:var(--soft)}
.snm svg .tick{font-size:11.5px}.snm svg .end{text-anchor:end}.snm svg .mid{text-anchor:middle}
.snm svg .inside{fill:#fff;font-size:11.5px}
.snm svg .name{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:12px}
.snm .weight{fill:var(--weight)}.snm .spike{fill:var(--spike)}.snm .done{fill:var(--done)}
.snm .mac{fill:var(--mac)}.snm .grey{fill:var(--grey)}.snm .ghost{fill:var(--ghost)}
.snm .band{fill:var(--band)}.snm .empty{fill:var(--ghost)}
.snm .rule{stroke:var(--line);stroke-width:1}
.snm .border{stroke:var(--soft);stroke-width:.7;fill:none;opacity:.55}
.snm .ring{fill:none;stroke:var(--ink);stroke-width:1.6}
.snm .legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);
margin:0 0 10px}
.snm .legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.snm .scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px}
.snm table{border-collapse:collapse;width:100%;font-size:12px;white-space:nowrap}
.snm th{font-weight:600;color:var(--soft);text-align:right;padding:8px 7px;
border-bottom:1px solid var(--line)}
.snm td{text-align:right;padding:5px 7px;font-variant-numeric:tabular-nums;color:var(--ink);
border-bottom:1px solid var(--line);background:none}
.snm tr:last-child td{border-bottom:0;font-weight:600}
.snm th:first-child,.snm td:first-child{text-align:left;position:sticky;left:0;
background:var(--bg)}
.snm td:first-child{font-family:ui-monospace,"DejaVu Sans Mono",monospace}
.snm footer{margin-top:26px;font-size:12.5px;color:var(--soft)}
"""


def page(report: Report) -> str:
    """A complete HTML document."""
    title = f"{escape(report.model)}: N:M sparsity report"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title>"
        "<style>html{color-scheme:light dark}body{margin:0;background:#fff}"
        "@media(prefers-color-scheme:dark){body{background:#12161d}}</style></head>"
        f"<body>{fragment(report)}</body></html>"
    )


def fragment(report: Report) -> str:
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
        _section("All figures", "Counts and energy are per sample.", _table(report)),
    ]
    return (
        f'<div class="snm"><style>{_STYLE}</style><h1>{escape(report.model)}</h1>'
        f"<p>{_subtitle(report)}</p>{_tiles(report)}{''.join(sections)}{_footer(report)}</div>"
    )


def _energy(picojoule: float) -> str:
    return energy_text(picojoule).replace("uJ", "\N{MICRO SIGN}J")


def _section(title: str, words: str, body: str) -> str:
    figure = f'<div class="figure">{body}</div>'
    return f"<h2>{title}</h2><p>{words}</p>{figure}" if body else ""


def _subtitle(report: Report) -> str:
    patterns = sorted({layer.pattern for layer in report.layers if layer.pattern})
    sparse = sum(layer.pattern is not None for layer in report.layers)
    shown = f" ({', '.join(patterns)})" if patterns else ""
    return (
        f"{sparse} of {len(report.layers)} weight layers are N:M{shown}. Measured on "
        f"{counted(report.samples, 'sample')} in {counted(report.batches, 'batch', 'batches')}."
    )


def _tiles(report: Report) -> str:
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
        ("PE utilisation", percent(report.utilisation), f"{report.pes} PEs, weights"),
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
        ("spike", "spikes"),
        ("done", "SynOps left"),
        ("mac", "MACs left (analog input)"),
    )
    items = "".join(
        f'<span><i style="background:var(--{colour})"></i>{words}</span>'
        for colour, words in entries
    )
    return f'<div class="legend">{items}</div>'


def _latency_words(report: Report) -> str:
    if report.latency is None:
        return ""
    return (
        f"One batch on this machine, median of {report.latency.repeats} interleaved forwards, "
        f"{counted(report.latency.threads, 'thread')}."
    )


_HEADS = (
    "layer", "weight", "pattern", "density", "kept |w|", "input", "rate in", "rate out",
    "dense ops", "SynOps", "MACs", "energy", "dual sparsity", "PE util.", "bytes", "packed",
)  # fmt: skip


def _table(report: Report) -> str:
    samples = max(report.samples, 1)
    times = report.latency
    variants = list(times.total) if times is not None else []
    heads = [*_HEADS, *(f"{name}, ms" for name in variants)]
    rows = []
    for layer in report.layers:
        cells = _cells(layer, samples)
        measured = times.layers.get(layer.name, {}) if times is not None else {}
        cells += [f"{1000 * measured[v]:.3f}" if v in measured else "-" for v in variants]
        rows.append(_row(cells, "; ".join(filter(None, (layer.reason, layer.note)))))
    total = report.operations
    sums = [
        "total", count_text(sum(layer.weights for layer in report.layers)), "",
        percent(report.density), "", "", percent(report.firing_rate), "",
        *(count_text(n / samples) for n in (total.dense, total.synops, total.macs)),
        _energy(report.picojoule), percent(report.dual_sparsity), percent(report.utilisation),
        bytes_text(report.dense_bytes), bytes_text(report.packed_bytes),
    ]  # fmt: skip
    sums += [f"{1000 * times.total[v]:.3f}" for v in variants] if times is not None else []
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}{_row(sums, '')}</tbody></table></div>"
    )


def _cells(layer: LayerReport, samples: int) -> list[str]:
    done = layer.operations
    return [
        layer.name or "(root)",
        "x".join(map(str, layer.shape)),
        layer.pattern or "dense",
        percent(layer.density),
        percent(layer.kept_magnitude),
        layer.signal or "never ran",
        percent(layer.rate_in),
        percent(layer.rate_out),
        count_text(done.dense / samples),
        count_text(done.synops / samples),
        count_text(done.macs / samples),
        _energy(layer.picojoule / samples),
        percent(layer.dual_sparsity),
        percent(layer.utilisation),
        bytes_text(layer.dense_bytes),
        bytes_text(layer.packed_bytes),
    ]


def _row(cells: list[str], title: str) -> str:
    inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr title="{escape(title)}">{inner}</tr>' if title else f"<tr>{inner}</tr>"


def _footer(report: Report) -> str:
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
