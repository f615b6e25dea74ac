# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: setuptools, plus the compiled kernels where a C++ compiler is present.

Without a compiler the wheel is a pure one and everything but the native kernels works; set
``SPIKENM_FX_REQUIRE_KERNELS=1`` to make that an error instead.  torch is not needed to build.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None

build_sdist = build_meta.build_sdist
# An editable install runs from the sources: the kernels are compiled at first use, so that they
# follow the sources as these change.
build_editable = build_meta.build_editable
get_requires_for_build_editable = build_meta.get_requires_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
get_requires_for_build_wheel = build_meta.get_requires_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Compile the kernels into the package if possible, then let setuptools build the wheel."""
    builder = _builder()
    # setuptools packs whatever an earlier build left in its folder: no stale kernels.
    for stale in Path("build").glob("lib*/spikenm_fx/native/_native"):
        shutil.rmtree(stale)
    try:
        _bundle(builder)
        settings: Settings = _with_platform_tag(config_settings)
    except builder.BuildError as error:
        if os.environ.get("SPIKENM_FX_REQUIRE_KERNELS", "0") not in ("", "0"):
            raise
        sys.stderr.write(f"spikenm_fx: the native kernels are left out: {error}\n")
        settings = config_settings
    try:
        return str(build_meta.build_wheel(wheel_directory, settings, metadata_directory))
    finally:
        shutil.rmtree(builder.BUNDLED, ignore_errors=True)


def _builder() -> ModuleType:
    # By path: importing the package would import torch, which is not there at build time.
    path = Path(__file__).parent.parent / "build.py"
    spec = importlib.util.spec_from_file_location("_spikenm_fx_kernel_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _bundle(builder: ModuleType) -> None:
    builder.build(builder.BUNDLED)
    (builder.BUNDLED / "SOURCES").write_text(builder.source_hash() + "\n")


def _with_platform_tag(settings: Settings) -> dict[str, Any]:
    """The wheel is for this platform, though for any Python: the library knows no Python."""
    settings = dict(settings or {})
    given = settings.get("--build-option", [])
    options = [given] if isinstance(given, str) else list(given)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    settings["--build-option"] = [*options, "--plat-name", platform]
    return settings
