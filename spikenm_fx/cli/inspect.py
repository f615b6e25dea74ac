# SPDX-License-Identifier: Apache-2.0
"""Commands that look and change nothing: plan, doctor, verify, report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikenm_fx.cli.common import (
    Checkpoint,
    Exit,
    Input,
    Json,
    Loaded,
    Pattern,
    RootOption,
    Screen,
)
from spikenm_fx.report.energy import PJ_PER_AC, PJ_PER_MAC, EnergyModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spikenm_fx.report import Report

__all__ = ["doctor", "plan", "report", "verify"]

Target = Annotated[str, typer.Argument(help="A recipe file, or module:Class.")]


def plan(
    target: Target,
    nm: Pattern = None,
    root: RootOption = None,
    shape: Input = None,
    as_json: Json = False,
) -> None:
    """Show which layers become N:M, which do not, and why."""
    screen = Screen(as_json)
    with screen.working("building the model"):
        decided = Loaded.named(target, root=root, nm=nm, shape=shape).plan()
    screen.result(decided.to_dict(), str(decided))


def verify(
    file: Annotated[
        Path, typer.Argument(help="Weights: .safetensors, .pt or packed; no model needed.")
    ],
    nm: Annotated[
        str | None,
        typer.Option("--nm", help="Required of all weights whose channels it divides."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--except", help="A layer that may be dense, e.g. the head; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a file's weights block by block; exit code 1 where they are not N:M."""
    from spikenm_fx.cli.blocks import verify_file

    screen = Screen(as_json)
    with screen.working(f"counting the blocks of {file.name}"):
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
        float, typer.Option(help="Picojoule of one accumulation.", min=0)
    ] = PJ_PER_AC,
    pj_per_mac: Annotated[
        float, typer.Option(help="Picojoule of one multiply-accumulate.", min=0)
    ] = PJ_PER_MAC,
    as_json: Json = False,
) -> None:
    """Measure density, firing rates, exact SynOps, energy and bytes."""
    from spikenm_fx.checkpoint import write_atomically

    screen = Screen(as_json)
    with screen.working("running the model"):
        batch = read_tensor(data) if data is not None else None
        loaded = Loaded.named(
            target, root=root, nm=nm, shape=shape, checkpoint=checkpoint, data=batch
        )
        dense = copy.deepcopy(loaded.model) if sparse else None
        if sparse:
            loaded.sparsify(loaded.plan(), "magnitude")
        found = measure(
            loaded,
            reference=dense,
            energy=EnergyModel(pj_per_ac, pj_per_mac),
            latency=_variants(loaded, dense) if latency else False,
        )
    if html is not None:
        write_atomically(html, lambda part: part.write_text(found.to_html(), encoding="utf-8"))
    note = f"\npage: {html}" if html is not None else ""
    screen.result(found.to_dict(), f"{found}{note}")


def _variants(loaded: Loaded, dense: nn.Module | None) -> dict[str, nn.Module]:
    """What there is to time: the model before, folded, and packed where it is N:M."""
    import spikenm_fx

    folded = copy.deepcopy(loaded.model)
    if dense is not None:
        spikenm_fx.fold(folded)
    elif not spikenm_fx.verify(folded).valid:
        return {"dense": folded}
    before = {"dense": dense} if dense is not None else {}
    return {**before, "folded": folded, "packed": spikenm_fx.pack(folded, loaded.batch())}


def measure(loaded: Loaded, batches: int = 2, **options: Any) -> Report:
    """The report of a loaded model over its data, or over random batches of its recipe.

    Args:
        loaded: what to run, and how.
        batches: random ones, where there is no data.
        options: of :func:`spikenm_fx.report`.
    """
    from spikenm_fx.recipe.target import forward, reset_function
    from spikenm_fx.report.measure import report as measured

    inputs = loaded.recipe.inputs
    seeds = range(batches if loaded.data is None else 1)
    reset = reset_function(loaded.recipe, loaded.root) if loaded.recipe.reset else None
    return measured(
        loaded.model,
        [loaded.batch(seed) for seed in seeds],
        forward=lambda model, batch: forward(model, batch, inputs),
        reset=reset,
        batch_dim=1 if inputs.time == "leading" else 0,
        **options,
    )


def read_tensor(path: Path) -> Tensor:
    """One tensor out of ``.npy``, ``.pt`` or ``.safetensors``; no code in them ever runs.

    Raises:
        CheckpointError: if it cannot be read, or holds several tensors, complex numbers, NaN or
            infinity.
    """
    import torch

    from spikenm_fx.errors import CheckpointError

    tensor = _read_npy(path) if path.suffix == ".npy" else _only_tensor(path)
    if tensor.is_complex():
        raise CheckpointError(f"{path}: holds complex numbers; a batch of real values is needed")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: holds NaN or infinity; a batch of finite values is needed")
    return tensor


def _read_npy(path: Path) -> Tensor:
    import numpy as np
    import torch

    from spikenm_fx.errors import CheckpointError

    try:
        found = torch.from_numpy(np.load(path, allow_pickle=False))
        return found if found.is_complex() else found.float()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise CheckpointError(f"{path}: not an array of numbers: {error}") from error


def _only_tensor(path: Path) -> Tensor:
    from spikenm_fx.checkpoint import load_state
    from spikenm_fx.errors import CheckpointError

    tensors = load_state(path)
    if len(tensors) != 1:
        raise CheckpointError(f"{path}: holds {len(tensors)} tensors; one batch is required")
    return next(iter(tensors.values()))


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
    from spikenm_fx.doctor import diagnose

    screen = Screen(as_json)
    with screen.working("examining the model"):
        loaded = Loaded.named(target, root=root, nm=nm, shape=shape, checkpoint=checkpoint)
        found = diagnose(loaded)
    screen.result(found.to_dict(), str(found))
    if found.runs is False:
        raise typer.Exit(Exit.INPUT)
    if found.runs and found.blocked:
        raise typer.Exit(Exit.NO)
