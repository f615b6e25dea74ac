# SPDX-License-Identifier: Apache-2.0
"""The verb ``export.nir``: a folded model as a NIR graph that one program reads as this model."""

from __future__ import annotations

import keyword
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import ExportError, SpikeNMWarning, TraceError, some_of
from spikenm_fx.export.model_run import in_steps, over_steps
from spikenm_fx.export.nir_edges import ordered_edges
from spikenm_fx.export.nir_nodes import fold_norms, nodes_for
from spikenm_fx.export.nir_readers import DT, Reader, reader_named
from spikenm_fx.export.nir_run import run_graph
from spikenm_fx.export.packages import needed, refuse_untested
from spikenm_fx.export.parts import StepGraph
from spikenm_fx.export.ready import arguments, at_rest, refuse_unready
from spikenm_fx.export.steps import read_steps
from spikenm_fx.pattern import NM
from spikenm_fx.trace import trace
from spikenm_fx.verify import verify

__all__ = ["nir", "write_nir"]


def nir(
    model: nn.Module,
    x: Tensor,
    target: str = "file",
    *,
    file: str | Path | None = None,
    check: bool = True,
    any_version: bool = False,
) -> Any:
    """``model`` as a NIR graph for one reader.

    The graph is made from the trace: batch norms folded, the time constants and r that this reader
    computes with, arrays of full shape in float32, pools in pairs.  It is then run step by step and
    held against the model's own spikes, neuron by neuron: what differs is refused.  The reader
    itself is asked by :func:`~spikenm_fx.export.nir_verify.verify_nir`.

    Args:
        model: folded, at rest, in float32; it is not changed.
        x: an example at which its neurons fire, as the model takes it: ``[T, N, ...]``,
            ``[N, T, ...]``, or ``[N, ...]`` for one step or an input that stays.
        target: who will read it: ``"snntorch"``, ``"spikingjelly"``, ``"norse"``, ``"sinabs"``, or
            ``"file"``, by the book.  Norse must be told ``dt=1e-4``.
        file: also write it there, completely or not at all.
        check: hold it against the model.
        any_version: accept another version of nir than the measured one.

    Returns:
        A ``nir.NIRGraph``; its metadata holds ``target``, ``dt`` and ``notes``, that of a layer
        its ``pattern`` and on which axis it lies.  A warning repeats the notes: what the model does
        beside its steps.

    Raises:
        ExportError: for what NIR or the reader cannot say, by name; for a model that is not folded,
            not at rest or not float32; where the nir package is missing.
        CheckpointError: if ``file`` cannot be written.
    """
    package = needed("nir", "export.nir")
    if not any_version:
        refuse_untested("nir")
    reader = reader_named(target)
    refuse_unready(model, "export.nir", dtypes=(torch.float32,))
    x = arguments(x, "export.nir")
    copied = at_rest(model, "export.nir")
    try:
        steps = read_steps(copied, trace(copied, x), x)
    except TraceError as error:
        raise ExportError(f"export.nir: {error}") from error
    listened = _listened(steps)
    weights = fold_norms(steps)
    _refuse_names(steps)
    nodes, checked = nodes_for(steps, weights, reader, _patterns(copied))
    edges = ordered_edges(steps, reader)
    _refuse_sums_at_output(steps, reader)
    metadata = {
        "spikenm_fx.target": target,
        "spikenm_fx.dt": DT,
        "spikenm_fx.notes": "\n".join(steps.notes),
    }
    try:
        graph = package.NIRGraph(nodes, edges, metadata, type_check=checked)
    except (ValueError, AssertionError, TypeError) as error:
        raise ExportError(f"export.nir: nir itself refuses the graph: {error}") from error
    if check:
        _hold_against(copied, x, steps, graph, reader, listened)
    if file is not None:
        write_nir(graph, file)
    for note in steps.notes:
        warnings.warn(SpikeNMWarning(f"export.nir: {note}"), stacklevel=2)
    return graph


def write_nir(graph: Any, file: str | Path) -> None:
    """Write a graph completely or not at all.

    Args:
        graph: a ``nir.NIRGraph``.
        file: where to.

    Raises:
        CheckpointError: if the disk refuses; an older file of that name is then as it was.
    """
    from spikenm_fx.checkpoint import write_atomically

    package = needed("nir", "export.nir")
    write_atomically(file, lambda part: package.write(str(part), graph))


def _patterns(model: nn.Module) -> dict[str, NM]:
    """The pattern that each layer has, by counting."""
    return {layer.name: layer.found for layer in verify(model).layers if layer.found}


def _refuse_names(steps: StepGraph) -> None:
    """Readers make names of Python: what they turn into the same would be lost."""
    taken: dict[str, str] = {}
    for name in steps.parts:
        plain = name.replace(".", "_")
        plain = f"nir_node_{plain}" if keyword.iskeyword(plain) else plain
        other = taken.setdefault(plain, name)
        if other != name:
            raise ExportError(
                f"the names {other!r} and {name!r} collide: readers call both {plain!r}; rename "
                "one of the two modules"
            )
    modules = {p.name for p in steps.parts.values() if p.module is not None}
    for reserved in {"input", "output", "state"} & modules:
        raise ExportError(
            f"a module is named {reserved!r}, which NIR's readers use themselves; rename it"
        )


def _refuse_sums_at_output(steps: StepGraph, reader: Reader) -> None:
    sources = steps.sources("output")
    if len(sources) > 1:
        raise ExportError(
            f"the output is the sum of {some_of(sources)}, which {reader.name} hands back as "
            "separate values; put a layer or neuron behind the sum"
        )
    if sources and any(t != "output" for t in steps.targets(sources[0])) and not reader.recurrent:
        raise ExportError(
            f"{sources[0]} is the output and feeds {steps.targets(sources[0])} as well, which "
            f"{reader.name} does not read as one"
        )


def _listened(steps: StepGraph) -> dict[str, str]:
    """Modules whose outputs are compared, and the node that each becomes."""
    found = {p.name: p.name for p in steps.parts.values() if p.kind == "neuron"}
    for source in steps.sources("output"):
        part = steps.parts[source]
        if part.kind == "norm":
            found[source] = steps.sources(source)[0]
        elif part.module is not None:
            found[source] = source
    return found


def _hold_against(
    model: nn.Module,
    x: Tensor,
    steps: StepGraph,
    graph: Any,
    reader: Reader,
    listened: Mapping[str, str],
) -> None:
    single = steps.lead == ("N",) and "T" not in steps.sizes
    own = over_steps(model, x, listened, steps.leads, steps.sizes, single=single)
    count = len(next(iter(own.values()))) if own else 1
    given = in_steps(x, steps.lead, count)
    ours = run_graph(graph, given, reader)
    for module, node in listened.items():
        expected, seen = own[module], ours[node]
        if seen.shape != expected.shape:
            raise ExportError(
                f"{module}: the graph's node emits {tuple(seen.shape)} over all steps, the model "
                f"{tuple(expected.shape)}; {_report()}"
            )
        if steps.parts[node].kind == "neuron" and steps.parts[node].spec is not None:
            wrong = expected != seen
        else:
            wrong = ~torch.isclose(expected, seen, rtol=1e-4, atol=1e-5 * _scale(expected))
        if bool(wrong.any()):
            step = int(wrong.flatten(1).any(1).nonzero()[0])
            raise ExportError(
                f"{module}: {int(wrong.sum())} of {wrong.numel()} outputs of the graph for "
                f"{reader.name} differ from the model's, first in step {step}: it would not be the "
                "same network. Either a membrane lies on its threshold within rounding (then "
                f"another example is equal), or {_report()}"
            )


def _report() -> str:
    return "the model does something between its layers that its trace does not show"


def _scale(values: Tensor) -> float:
    largest = float(values.abs().max()) if values.numel() else 1.0
    return max(1.0, largest) if math.isfinite(largest) else 1.0
