# SPDX-License-Identifier: Apache-2.0
"""The packages that exports need: none is a dependency, each is asked for by its name."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

from spikenm_fx.errors import ExportError

__all__ = ["TESTED", "needed", "quiet", "refuse_untested"]

TESTED: Mapping[str, str] = MappingProxyType(
    {
        "nir": "1.0.8",
        "nirtorch": "2.6",
        "spikingjelly": "2.0.0",
        "snntorch": "1.0.0",
        "norse": "1.1.0",
        "sinabs": "3.1.3",
    }
)
"""Versions whose way to read NIR was measured: an other one may read the same file otherwise."""

_EXTRAS = {"nir": "nir", "nirtorch": "nir", "onnx": "onnx", "onnxscript": "onnx"}


def needed(package: str, task: str) -> Any:
    """The module of that name.

    Args:
        package: name of the package and of its module.
        task: what it is needed for, for the message.

    Raises:
        ExportError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if error.name not in (package, None):
            raise ExportError(
                f"{task} needs the package {package}, which is installed but cannot be imported: "
                f"{error}"
            ) from error
        extra = _EXTRAS.get(package)
        pinned = f"{package}=={TESTED[package]}" if package in TESTED else package
        command = f'pip install "spikenm_fx[{extra}]"' if extra else f'pip install "{pinned}"'
        raise ExportError(
            f"{task} needs the package {package}, which is not installed: {command}"
        ) from error


def refuse_untested(*packages: str) -> None:
    """Let through packages in the version whose behaviour was measured.

    Raises:
        ExportError: for another version, with the command that installs the measured one.
    """
    for package in packages:
        try:
            found = version(package)
        except PackageNotFoundError:
            continue  # run from sources: nothing tells its version
        if found != TESTED[package]:
            raise ExportError(
                f"{package} {found} is installed, and how it reads NIR was measured with "
                f'{TESTED[package]} only: pip install "{package}=={TESTED[package]}", or pass '
                "any_version=True and look at what verify_nir finds"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What exporters and readers print, log and warn of meanwhile is theirs, not the caller's."""
    level = logging.root.manager.disable
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
