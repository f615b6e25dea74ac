# SPDX-License-Identifier: Apache-2.0
"""Chapter on reading models: what ``trace`` finds, held against measurement."""

from __future__ import annotations

from spikenm_fx.bench.tables.chapter import Chapter, Result, markdown, times
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


def _further(result: Result) -> str:
    head = (
        *("network", "layers", "neurons found / there", "spike edges, wrong, missed"),
        *("sparse with / without examples", "folded", "pack difference", "model / engine"),
    )
    rows, notes = [], []
    for row in result["rows"]:
        name = f"{row['network']} ({row['repo']})"
        if row["error"]:
            rows.append((name, row["error"], *[""] * (len(head) - 2)))
            continue
        ratio = row.get("ratio", row["model_ms"] / row["engine_ms"])
        rows.append((
            name, row["layers"], f"{row['neurons']} / {row['there']}",
            f"{row['edges']}, {row['wrong']}, {row['missed']}",
            f"{row['sparse']} / {row['sparse_without']}", "equal" if row["folded"] else "differs",
            f"{row['difference']:.1g}", f"{ratio:.2f} ({row['form']})",
        ))  # fmt: skip
        only = [f"`{layer}` ({why})" for layer, why in row.get("only_without", {}).items()]
        notes += [f"- {row['network']}: {', '.join(only)}"] if only else []
    right = sum(result["cases"].values())
    told = ""
    if notes:
        told = (
            "\n\nLayers that become N:M without examples alone, each with what the examples show:"
            "\n\n" + "\n".join(notes)
        )
    earlier = [row["network"] for row in result["rows"] if "ratio" not in row]
    if earlier:
        told += (
            "\n\nMeasured with an earlier version, where times are those that `pack` took itself: "
            f"{', '.join(earlier)}."
        )
    return f"{right} of {len(result['cases'])} cases right.\n\n{markdown(head, rows)}{told}"


def _lowering(result: Result) -> str:
    rows = result["rows"]
    done = [row for row in rows if not row["error"]]
    whole = sum(row["whole"] for row in done)
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["network"], row["error"], "", "", "", ""))
            continue
        programs = "the whole" if row["whole"] else row["programs"] or "none"
        why = row["why"].removeprefix("pack: There is no program of this network. ")
        lines.append(
            (
                row["network"],
                programs,
                f"{row['native']} of {row['layers']}",
                f"{row['difference']:.0e}" if row["difference"] else "0",
                times(row["gain"]),
                why.partition(" It runs without one")[0].replace("|", "\\|"),
            )
        )
    head = ("network", "programs", "layers in them", "difference", "over the model", "why not all")
    return f"{whole} of {len(rows)} whole.\n\n{markdown(head, lines)}"


CHAPTERS = (
    Chapter("Tracing", ("trace",), "python -m spikenm_fx.bench trace --repos DIR", _trace),
    Chapter(
        "Repositories that nobody had used",
        ("further",),
        "python -m spikenm_fx.bench further --repos DIR --cases DIR",
        _further,
        "Networks of public repositories with random weights, read, decided, folded and packed. "
        "Where spikes differ between engine and model, a membrane lay on its threshold, or the "
        "network draws at random. Model and engine took turns in one process, after `pack` was "
        "done; the median of the turns' ratios of processor times is given, as other work ran on "
        "the machine. Where `pack` answers to keep the model (torch), both run the same code, and "
        "what differs from 1 is what such a measurement cannot tell.",
    ),
    Chapter(
        "Which networks become programs",
        ("lowering",),
        "python -m spikenm_fx.bench lowering --repos DIR",
        _lowering,
        "Models of frameworks and of public repositories, pruned to 2:4: how much of each runs as "
        "native programs (`pack(model, x, program=True)`), and what keeps the rest out. `pack` "
        "itself compares each program with the model, neuron by neuron on the model's own spikes; "
        "the difference here is that of the whole outputs on other inputs, where a membrane on its "
        "threshold may decide otherwise. Over the model: as `pack` measured it; the machine was "
        "busy with other work.",
    ),
)
