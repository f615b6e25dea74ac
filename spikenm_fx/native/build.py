# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels: by pip when a wheel is built, else once per user, else not at all.

``python -m spikenm_fx.native.build`` compiles into the per-user cache and prints where; with
``--sanitize`` it makes the AddressSanitizer/UBSan library.  This file needs neither torch nor the
rest of the package: the packaging backend loads it by its path.

Environment:
    CXX: the compiler; else ``c++``, ``g++`` or ``clang++`` on the path.
    SPIKENM_FX_CACHE: folder for compiled kernels; else ``$XDG_CACHE_HOME/spikenm_fx``.
    SPIKENM_FX_BUILD: ``0`` forbids compiling at first use; dense torch then serves.
    SPIKENM_FX_SANITIZE: ``1`` uses the sanitizer build.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BuildError", "Built", "build", "cached_library", "find_compiler", "library_name"]

SOURCES = Path(__file__).parent / "csrc"
BUNDLED = Path(__file__).parent / "_native"  # where a wheel carries the library
TIMEOUT_S = 600

COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",  # every ISA level rounds alike, and as torch's unfused operations do
    "-Wno-psabi",
)
RELEASE = ("-O3",)
SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")

X86_LEVELS = {
    "baseline": ("-march=x86-64",),
    "v3": ("-march=x86-64-v3",),
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
# Left out where the compiler or the system does not know it.
AMX = ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
OTHER_LEVELS: dict[str, tuple[str, ...]] = {"baseline": ()}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message holds the compiler's own words."""


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled library and how it came to be.

    Attributes:
        path: of the shared library.
        origin: ``"wheel"``, ``"cache"`` or ``"built"``.
    """

    path: Path
    origin: str


def library_name() -> str:
    """File name of the library on this platform."""
    return "libspikenm_kernels" + (".dll" if sys.platform == "win32" else ".so")


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none."""
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        return command if shutil.which(command[0]) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def levels() -> dict[str, tuple[str, ...]]:
    """ISA levels that are compiled on this architecture, with their flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return X86_LEVELS if x86 else OTHER_LEVELS


def wants_sanitizers() -> bool:
    """Whether the environment asks for the sanitizer build."""
    return os.environ.get("SPIKENM_FX_SANITIZE", "0") not in ("", "0")


def source_hash(*, sanitize: bool = False) -> str:
    """Key of a build: sources, flags and architecture."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    flags = (COMMON, SANITIZE if sanitize else RELEASE, sorted(levels().items()), AMX)
    digest.update(repr((flags, platform.machine(), sys.platform)).encode())
    return digest.hexdigest()[:20]


def cache_folder() -> Path:
    """Where compiled kernels are kept for this user."""
    chosen = os.environ.get("SPIKENM_FX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikenm_fx"


def cached_library(*, sanitize: bool = False, may_build: bool = True) -> Built:
    """The library of these sources: from the wheel, from the cache, or compiled now.

    Raises:
        BuildError: if there is none and it cannot be, or must not be, compiled.
    """
    bundled = BUNDLED / library_name()
    if not sanitize and bundled.is_file():
        stamp = BUNDLED / "SOURCES"
        if stamp.is_file() and stamp.read_text().strip() == source_hash():
            return Built(bundled, "wheel")
    path = cache_folder() / source_hash(sanitize=sanitize) / library_name()
    if path.is_file():
        return Built(path, "cache")
    if not may_build or os.environ.get("SPIKENM_FX_BUILD") == "0":
        raise BuildError("the kernels are not compiled, and SPIKENM_FX_BUILD=0 forbids it")
    build(path.parent, sanitize=sanitize)
    return Built(path, "built")


def build(folder: Path, *, sanitize: bool = False) -> Path:
    """Compile every ISA level and link them into ``folder``; the library appears atomically.

    Raises:
        BuildError: if no compiler is found or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found; install one, or name it in CXX")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            finished = _compile(compiler, Path(scratch), sanitize=sanitize)
            os.replace(finished, folder / library_name())
    except OSError as error:
        raise BuildError(f"the kernels cannot be written to {folder}: {error}") from error
    return folder / library_name()


def _compile(compiler: list[str], scratch: Path, *, sanitize: bool) -> Path:
    flags = [*COMMON, *(SANITIZE if sanitize else RELEASE)]
    x86 = ["-DSNM_X86"] if "v4" in levels() else []
    objects = [scratch / "dispatch.o"]
    isas = dict(levels())
    if x86 and _knows_amx(compiler):
        isas["amx"] = AMX
        x86.append("-DSNM_AMX")
    jobs = [[*compiler, *flags, *x86, "-c", str(SOURCES / "dispatch.cpp"), "-o", str(objects[0])]]
    for level, isa in isas.items():
        objects.append(scratch / f"{level}.o")
        table = [f"-DSNM_TABLE=snm_kernels_{level}", f'-DSNM_NAME="{level}"']
        source = str(SOURCES / "kernels.cpp")
        jobs.append([*compiler, *flags, *x86, *isa, *table, "-c", source, "-o", str(objects[-1])])
    for job in jobs:
        _run(job)
    library = scratch / library_name()
    _run([*compiler, *flags, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _knows_amx(compiler: list[str]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        _run([*compiler, *AMX, "-x", "c++", "-fsyntax-only", "/dev/null"])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\nfailed:\n{done.stderr[-4000:]}")


def main() -> None:
    """Command line: compile into the cache and say where."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.native.build", description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="AddressSanitizer and UBSan")
    parser.add_argument("--preload", action="store_true", help="print what LD_PRELOAD must hold")
    parser.add_argument("--into", type=Path, help="folder, instead of the per-user cache")
    options = parser.parse_args()
    try:
        if options.preload:
            sys.stdout.write(sanitizer_runtimes() + "\n")
            return
        if options.into:
            path = build(options.into, sanitize=options.sanitize)
        else:
            path = cached_library(sanitize=options.sanitize).path
    except BuildError as error:
        sys.exit(f"{error}")
    sys.stdout.write(f"{path}\n")


def sanitizer_runtimes() -> str:
    """The sanitizer libraries that must be preloaded into Python, as LD_PRELOAD wants them.

    Raises:
        BuildError: if no compiler is found.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found; install one, or name it in CXX")
    # libstdc++ too: its interceptors must find it loaded, which Python alone does not do.
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = (
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    )
    return ":".join(str(Path(path).resolve()) for path in found if Path(path).is_file())


if __name__ == "__main__":
    main()
