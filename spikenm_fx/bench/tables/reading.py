# SPDX-License-Identifier: Apache-2.0
"""Chapter on reading models: what ``trace`` finds, held against measurement."""

from __future__ import annotations

from spikenm_fx.bench.tables.chapter import Chapter, Result
from spikenm_fx.bench.trace import table
from spikenm_fx.bench.tracing import Row

__all__ = ["CHAPTERS"]


def _trace(result: Result) -> str:
    rows = [Row(**row) for row in result["rows"]]
    run = [row for row in rows if not (row.error or row.refused)]
    groups = {state: sum(row.groups.get(state, 0) for row in run) for state in ("exact", "frozen")}
    about = (
        f"{len(rows)} models of frameworks, hand-written and of public repositories; {len(run)} "
        f"run. {sum(row.found for row in run)} of {sum(row.layers for row in run)} layers; "
        f"{sum(row.spike_edges for row in run):,} spike edges, "
        f"{sum(row.spike_wrong + row.input_wrong for row in run)} wrong, "
        f"{sum(row.spike_missed for row in run)} missed; {groups['exact']} groups of coupled "
        f"channels permuted exactly, {groups['frozen']} frozen with a reason; "
        f"{sum(row.within_memory for row in run)} of {len(run)} need at most the memory of two "
        "forwards and 16 KiB beside the model."
    )
    return f"{about}\n\n{table(rows)}"


CHAPTERS = (Chapter("Tracing", ("trace",), "python -m spikenm_fx.bench trace --repos DIR", _trace),)
