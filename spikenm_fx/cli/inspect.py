# SPDX-License-Identifier: Apache-2.0
"""Commands that look and change nothing: plan, doctor, verify, report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import typer

from spikenm_fx.cli.common import (
    Checkpoint,
    Exit,
    Input,
    Json,
    Pattern,
    RootOption,
    Screen,
    Target,
    shape_of,
)

__all__ = ["doctor", "plan", "report", "verify"]


def plan(
    target: Target,
    nm: Pattern = None,
    root: RootOption = None,
    shape: Input = None,
    as_json: Json = False,
) -> None:
    """Show which layers become N:M, which do not, and why."""
    screen, asked = Screen(as_json), shape_of(shape)
    with screen.working("building the model"):
        from spikenm_fx.recipe import load_model

        decided = load_model(target, root=root, nm=nm, shape=asked).plan()
    screen.result(decided.to_dict(), str(decided))


def verify(
    file: Annotated[
        Path,
        typer.Argument(help="Weights: .safetensors, .pt, .onnx or packed; no model needed."),
    ],
    nm: Annotated[
        str | None,
        typer.Option("--nm", help="Required of all weights whose channels it divides."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Recipe or module:Class: its plan is what is required."),
    ] = None,
    root: RootOption = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--except", help="A layer that may be dense, e.g. the head; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a file's weights block by block; exit code 1 where they are not N:M."""
    screen = Screen(as_json)
    with screen.working(f"counting the blocks of {file.name}"):
        if recipe is not None:
            from spikenm_fx.recipe import load_model

            loaded = load_model(recipe, root=root, nm=nm, checkpoint=file, packed=True)
            found = loaded.verify(without or ())
        elif file.suffix == ".onnx":
            from spikenm_fx.export.onnx_verify import verify_onnx

            found = verify_onnx(file, nm, without or ())
        else:
            from spikenm_fx.pack.check.stored import verify_file

            found = verify_file(file, nm, without or ())
    dense = [layer.name for layer in found.layers if layer.violations and layer.density == 1.0]
    hint = "\nmeant to be dense? " + " ".join(f"--except {name}" for name in dense[:3])
    screen.result(found.to_dict(), f"{found}{hint if dense and not found.valid else ''}")
    if not found.valid:
        raise typer.Exit(Exit.NO)


def report(
    target: Target,
    nm: Pattern = None,
    root: RootOption = None,
    shape: Input = None,
    checkpoint: Checkpoint = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Input instead of noise: .npy, .pt or .safetensors, one tensor."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    sparse: Annotated[
        bool, typer.Option("--sparsify", help="Report the one-shot sparse model instead.")
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time it too: dense, folded, packed.")
    ] = False,
    pj_per_ac: Annotated[
        float | None,
        typer.Option(help="Picojoule of one accumulation; else that of 45 nm.", min=0),
    ] = None,
    pj_per_mac: Annotated[
        float | None,
        typer.Option(help="Picojoule of one multiply-accumulate; else that of 45 nm.", min=0),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure density, firing rates, exact SynOps, energy and bytes."""
    screen, asked = Screen(as_json), shape_of(shape)
    with screen.working("running the model"):
        from spikenm_fx.checkpoint import load_tensor
        from spikenm_fx.recipe import load_model
        from spikenm_fx.report import PJ_PER_AC, PJ_PER_MAC, EnergyModel

        batch = load_tensor(data) if data is not None else None
        loaded = load_model(
            target, root=root, nm=nm, shape=asked, checkpoint=checkpoint, data=batch
        )
        if sparse:
            loaded.keep_channels()
        dense = copy.deepcopy(loaded.model) if sparse else None
        if sparse:
            loaded.sparsify(loaded.plan(), "magnitude")
        energy = EnergyModel(
            PJ_PER_AC if pj_per_ac is None else pj_per_ac,
            PJ_PER_MAC if pj_per_mac is None else pj_per_mac,
        )
        timed = loaded.variants(dense) if latency else False
        found = loaded.report(reference=dense, energy=energy, latency=timed)
    if html is not None:
        found.to_html(html)
    note = f"\npage: {html}" if html is not None else ""
    screen.result(found.to_dict(), f"{found}{note}")


def doctor(
    target: Target,
    nm: Pattern = None,
    root: RootOption = None,
    shape: Input = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Say what will happen to each layer, what blocks the rest, and what to do about it.

    Exit code 3 where the model does not run on the input, 1 where its kernels cannot be tried.
    """
    screen, asked = Screen(as_json), shape_of(shape)
    with screen.working("examining the model"):
        from spikenm_fx.doctor import doctor as examine
        from spikenm_fx.recipe import load_model

        loaded = load_model(target, root=root, nm=nm, shape=asked, checkpoint=checkpoint)
        found = examine(
            loaded.model,
            loaded.batch() if loaded.knows_its_input else None,
            forward=loaded.run,
            fresh=not loaded.trained,
            **loaded.recipe.plan_options(),
        )
    screen.result(found.to_dict(), str(found))
    if found.runs is False:
        raise typer.Exit(Exit.INPUT)
    if found.runs and found.blocked:
        raise typer.Exit(Exit.NO)
