# SPDX-License-Identifier: Apache-2.0
"""The commands together, and what becomes of errors: a message and an exit code, no traceback."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from spikenm_fx.cli.bench import bench
from spikenm_fx.cli.channels import permute, remove_channels, remove_dead_channels
from spikenm_fx.cli.common import EPILOG, Exit, Screen
from spikenm_fx.cli.demo import demo
from spikenm_fx.cli.inspect import doctor, plan, report, verify
from spikenm_fx.cli.recipes import recipes
from spikenm_fx.cli.transform import pack, sparsify
from spikenm_fx.errors import SpikeNMError, VerificationError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(version("spikenm_fx"))
        except PackageNotFoundError:
            typer.echo("unknown: run from sources that are not installed")
        raise typer.Exit()


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learnable N:M sparsity for spiking neural networks.

    A model is named by a recipe file (recipes/spikformer.yaml) or as module:Class.
    """


for command in (
    *(demo, plan, doctor, permute, sparsify, verify),
    *(remove_dead_channels, remove_channels, pack, report, bench),
):
    app.command(epilog=EPILOG)(command)
app.add_typer(recipes, name="recipe")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; always leaves by SystemExit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = app(words, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = Exit.INTERRUPTED
    except VerificationError as error:
        if debug:
            raise
        code = _fail(str(error), type(error).__name__, Exit.NO, words)
    except SpikeNMError as error:
        if debug:
            raise
        code = _fail(str(error), type(error).__name__, Exit.INPUT, words)
    except BrokenPipeError:
        code = Exit.OK
    except Exception as error:
        # Old typers raise click's errors, new ones their own copies: both format their message.
        usage = getattr(error, "format_message", None)
        if callable(usage):
            sys.exit(_fail(f"{usage()} (--help lists the options)", "Usage", Exit.USAGE, words))
        if debug:
            raise
        hint = "this is a mistake of spikenm-fx or of the model's code; --debug shows where"
        words_of = f"{type(error).__name__}: {error}\n{hint}"
        code = _fail(words_of, type(error).__name__, Exit.INTERNAL, words)
    sys.exit(int(code or 0))


def _fail(message: str, kind: str, code: Exit, words: list[str]) -> Exit:
    if "--json" in words:
        Screen(True).json({"error": {"type": kind, "message": message, "exit_code": int(code)}})
    else:
        typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(message, err=True)
    return code
