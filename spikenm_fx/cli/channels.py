# SPDX-License-Identifier: Apache-2.0
"""Commands that write a checkpoint with other channels: permuted, or fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikenm_fx.cli.common import (
    CheckpointIn,
    Force,
    Input,
    Json,
    Out,
    Pattern,
    RootOption,
    Screen,
    Target,
    refuse_existing,
    shape_of,
)

if TYPE_CHECKING:
    from torch import nn

    from spikenm_fx.channels import Removal
    from spikenm_fx.recipe import LoadedModel

__all__ = ["permute", "remove_channels", "remove_dead_channels"]

Data = Annotated[
    Path | None,
    typer.Option(help="Input instead of noise: .npy, .pt or .safetensors, one tensor."),
]
Latency = Annotated[
    bool, typer.Option("--latency", help="Time both models in turn, as they are and packed.")
]
OutSmaller = Annotated[
    Path, typer.Option("--out", "-o", help="File to write, .safetensors; must not exist.")
]


def permute(
    target: Target,
    checkpoint: CheckpointIn,
    out: Out,
    nm: Pattern = None,
    root: RootOption = None,
    shape: Input = None,
    data: Data = None,
    score: Annotated[
        str, typer.Option(help="What N:M shall keep: magnitude, or rate, which weighs by inputs.")
    ] = "magnitude",
    seconds: Annotated[float, typer.Option(help="For the search, of all layers together.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Put a dense checkpoint's channels in the order in which N:M keeps most; no output changes."""
    screen, asked = Screen(as_json), shape_of(shape)
    refuse_existing(out, force)
    from rich.progress import Progress

    with screen.working("building the model"):
        from spikenm_fx.channels import apply_permutation, plan_permutation
        from spikenm_fx.checkpoint import load_tensor
        from spikenm_fx.recipe import load_model

        batch = load_tensor(data) if data is not None else None
        loaded = load_model(
            target, root=root, nm=nm, shape=asked, checkpoint=checkpoint, data=batch
        )
        example, decided = loaded.batch(), loaded.plan()
    with Progress(console=screen.err, transient=True) as progress, screen.working(""):
        task = progress.add_task("searching", total=1.0)
        found = plan_permutation(
            loaded.model,
            example,
            decided,
            score=score,  # type: ignore[arg-type]  # it refuses others by name
            seconds=seconds,
            seed=seed,
            progress=lambda share: progress.update(task, completed=share),
        )
    apply_permutation(loaded.model, found)
    loaded.save(out)
    screen.result({"out": str(out), **found.to_dict()}, f"{found}\nwritten: {out}")


def remove_dead_channels(
    target: Target,
    checkpoint: CheckpointIn,
    out: OutSmaller,
    nm: Annotated[
        str | None,
        typer.Option("--nm", help="Pattern to keep; else the sparsest that each layer has."),
    ] = None,
    root: RootOption = None,
    shape: Input = None,
    silent_on: Annotated[
        Path | None,
        typer.Option(
            "--silent-on",
            help="A batch, as for report --data: neurons that do not spike on it are dead, too.",
        ),
    ] = None,
    latency: Latency = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take out channels that nothing depends on; surviving layers stay N:M.

    The other commands read the smaller checkpoint as any other.
    """

    def remove(loaded: LoadedModel) -> Removal:
        from spikenm_fx.channels import remove_dead_channels

        seen = None if loaded.data is None else [loaded.data]
        return remove_dead_channels(loaded.model, loaded.batch(), nm=nm, silent_on=seen)

    named = {"target": target, "root": root, "shape": shape_of(shape), "checkpoint": checkpoint}
    _remove(remove, named, silent_on, out, force, latency, Screen(as_json), keep_metadata=True)


def remove_channels(
    target: Target,
    checkpoint: CheckpointIn,
    out: OutSmaller,
    keep: Annotated[float, typer.Option(help="Share of each group's channels that stays.")] = 0.2,
    score: Annotated[
        str, typer.Option(help="What channels are judged by: activity, membrane or magnitude.")
    ] = "activity",
    multiple_of: Annotated[
        int, typer.Option(help="Round the number that stays up to a multiple, e.g. 4 for 2:4.")
    ] = 1,
    root: RootOption = None,
    shape: Input = None,
    data: Data = None,
    latency: Latency = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Keep the most active channels of a dense checkpoint, to be trained on; the rest is cut.

    The other commands read the smaller checkpoint as any other.
    """

    def remove(loaded: LoadedModel) -> Removal:
        from spikenm_fx.channels import remove_channels

        return remove_channels(
            loaded.model,
            loaded.batch(),
            keep,
            score=score,  # type: ignore[arg-type]  # it refuses others by name
            multiple_of=multiple_of,
        )

    named = {"target": target, "root": root, "shape": shape_of(shape), "checkpoint": checkpoint}
    _remove(remove, named, data, out, force, latency, Screen(as_json))


def _remove(
    remove: Callable[[LoadedModel], Removal],
    named: Mapping[str, Any],
    data: Path | None,
    out: Path,
    force: bool,
    latency: bool,
    screen: Screen,
    *,
    keep_metadata: bool = False,
) -> None:
    """Remove, write, and show what was saved."""
    from spikenm_fx.checkpoint import load_metadata

    refuse_existing(out, force)
    metadata = load_metadata(named["checkpoint"]) if keep_metadata else {}
    with screen.working("removing channels"):
        from spikenm_fx.channels import save_smaller
        from spikenm_fx.channels.stored import refuse_suffix
        from spikenm_fx.checkpoint import load_tensor
        from spikenm_fx.recipe import load_model
        from spikenm_fx.report import compare

        refuse_suffix(out)
        batch = load_tensor(data) if data is not None else None
        # built twice: copies of some frameworks' models are not reset by the framework
        before, loaded = (load_model(data=batch, **named) for _ in range(2))
        saved = remove(loaded)
        timed = _variants(before=before, after=loaded) if latency else False
        found = compare(before.report(), loaded.report(latency=timed))
        save_smaller(out, loaded.model, metadata=metadata)
    screen.result(
        {"out": str(out), "removal": saved.to_dict(), "comparison": found.to_dict()},
        f"{saved}\n\n{found}\nwritten: {out}",
    )


def _variants(**models: LoadedModel) -> dict[str, nn.Module]:
    return {
        f"{when}, {how}": variant
        for when, loaded in models.items()
        for how, variant in loaded.variants().items()
    }
