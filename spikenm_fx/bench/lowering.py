# SPDX-License-Identifier: Apache-2.0
"""Which networks become one native program, what keeps the others from it, and is it the model.

The frameworks' models, and those of public repositories, pruned and folded; ``pack(model, x,
program=True)`` compares each program with its model neuron by neuron on the model's own spikes, and
refuses what differs.  Here the outputs of both are compared once more, on other inputs.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.bench.apart import row_apart
from spikenm_fx.bench.measure import RESULTS, machine
from spikenm_fx.bench.nets.further import FURTHER, build_further
from spikenm_fx.bench.repos import REPOS, build
from spikenm_fx.bench.zoo import ZOO, Case
from spikenm_fx.errors import SpikeNMError, SpikeNMWarning
from spikenm_fx.pack import packing
from spikenm_fx.pack.check.difference import difference
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.program import Engine
from spikenm_fx.program.part import ProgramPart
from spikenm_fx.state import preserved

__all__ = ["LoweringRow", "main", "row_of"]


@dataclass(slots=True)
class LoweringRow:
    """What became of one network.

    Attributes:
        network: its name; of a repository with the repository's.
        layers: weights of at least two dimensions in layers.
        native: those of them that run in a program.
        programs: how many programs; 1 with all layers native is the whole network.
        whole: the whole network is one program.
        why: what keeps the whole from it.
        difference: of the outputs from the model's, relative to its largest value, on inputs
            that ``pack`` had not seen.
        gain: time of the model's forward over the engine's, as ``pack`` measured it.
        error: what went wrong.
    """

    network: str
    layers: int = 0
    native: int = 0
    programs: int = 0
    whole: bool = False
    why: str = ""
    difference: float = 0.0
    gain: float = 0.0
    error: str = ""


def row_of(name: str, case: Case) -> LoweringRow:
    """Make the program of one network, and compare.

    Args:
        name: of the network.
        case: the network; it is changed.
    """
    row = LoweringRow(name)
    model: Any = case.model
    try:
        plan = spikenm_fx.plan(model, "2:4", example_inputs=case.inputs)
        model = spikenm_fx.fold(spikenm_fx.sparsify(model, plan, method="magnitude"))
    except SpikeNMError:
        pass  # nothing of it can be sparse: its program is that of dense layers
    case.reset(model)
    row.layers = sum(is_weight_layer(module) for module in nn.Module.modules(model))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine: Any = spikenm_fx.pack(model, case.inputs, program=True)
    said = [str(w.message) for w in told if isinstance(w.message, SpikeNMWarning)]
    row.whole = isinstance(engine, Engine)
    row.why = "" if row.whole else next((text for text in said if "no program" in text), "")[:300]
    parts = [m for m in nn.Module.modules(engine) if isinstance(m, ProgramPart)]
    row.programs = 1 if row.whole else len(parts)
    outside = sum(
        is_weight_layer(module) or isinstance(module, PackedLayer)
        for module in nn.Module.modules(engine)
    )
    row.native = row.layers if row.whole else max(0, row.layers - outside)
    whole = packing(engine).whole
    row.gain = 0.0 if whole is None else whole.gain
    other = tuple(_another(x) for x in case.inputs)
    pairs = zip(_output(case, engine, other), _output(case, model, other), strict=False)
    row.difference = max(
        (difference(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)),
        default=0.0,
    )
    return row


def _another(x: Tensor) -> Tensor:
    """An input of the same numbers in other places."""
    generator = torch.Generator().manual_seed(2)
    return x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x)


def _output(case: Case, model: Any, inputs: tuple[Tensor, ...]) -> list[Any]:
    """What a forward from rest returns, place by place; of a program, None in those of states."""
    if isinstance(model, Engine):
        model.reset()
    else:
        case.reset(model)
    torch.manual_seed(1)
    with torch.no_grad(), preserved(model):
        out = model(*(x.clone() for x in inputs))
    places = list(out) if isinstance(out, tuple | list) else [out]
    return [x.clone() if isinstance(x, Tensor) else x for x in places]


def _build(name: str, options: argparse.Namespace) -> Case:
    group, _, rest = name.partition(":")
    if group == "zoo":
        return ZOO[rest].build()
    if group == "repos":
        return build(rest, options.repos, options.repos / "_site")
    return build_further(rest, options.repos)


def _names(options: argparse.Namespace) -> list[str]:
    names = [f"zoo:{name}" for name, e in ZOO.items() if e.available and not e.refuses]
    if options.repos is not None:
        there = {file.name for file in options.repos.iterdir()}
        names += [f"repos:{name}" for name, checkout in REPOS.items() if checkout.folder in there]
        names += [
            f"further:{name}" for name, e in FURTHER.items() if e.repo.partition("/")[2] in there
        ]
    return [name for name in names if options.only in name]


def _apart(name: str, options: argparse.Namespace) -> LoweringRow:
    arguments = ["--one", name]
    if options.repos is not None:
        arguments += ["--repos", str(options.repos.resolve())]
    scripted = name.startswith("repos:") and REPOS[name.partition(":")[2]].scripted
    row = row_apart("lowering", arguments, seconds=options.seconds, scripted=scripted)
    return LoweringRow(name, error=row) if isinstance(row, str) else LoweringRow(**row)


def main(arguments: Sequence[str]) -> int:
    """Try each network that is there, and keep the rows under ``results/``."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.bench lowering")
    parser.add_argument("--repos", type=Path, help="folder of checkouts, with _site/ of releases")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--seconds", type=float, default=600.0, help="for one network, at most")
    parser.add_argument("--output", type=Path, default=RESULTS / "lowering.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        torch.set_num_threads(1)
        output = options.output.resolve()
        row = row_of(options.one, _build(options.one, options))
        output.write_text(json.dumps(asdict(row)))
        return 0
    known = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = {row["network"]: row for row in known}
    for name in _names(options):
        row = _apart(name, options)
        rows[name] = asdict(row)
        what = "whole" if row.whole else f"{row.programs} programs, {row.native} of {row.layers}"
        print(
            f"{name}: {row.error or what} {row.difference:.1g} {row.gain:.2f}x {row.why}",
            flush=True,
        )
        options.output.write_text(
            json.dumps({"machine": machine(), "rows": list(rows.values())}, indent=1) + "\n"
        )
    return int(any(row["error"] for row in rows.values()))
