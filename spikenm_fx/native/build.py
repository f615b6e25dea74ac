# SPDX-License-Identifier: Apache-2.0
"""Find the compiled kernels, or compile them: pip does at install, this module at first use.

An installed package carries the library.  In a source tree, or where the sources have changed
since they were installed, CMake compiles them once per user, compiler and C library; processes
that start together wait for the one that compiles, and a line in the log says so.
``python -m spikenm_fx.native.build`` does it ahead of time and prints where the library is; with
``--sanitize`` it makes the AddressSanitizer/UBSan library.

Environment:
    CXX: the compiler; else ``c++``, ``g++`` or ``clang++`` on the path.
    SPIKENM_FX_CACHE: folder for compiled kernels; else ``$XDG_CACHE_HOME/spikenm_fx``.
    SPIKENM_FX_BUILD: ``0`` forbids compiling at first use; dense torch then serves.
    SPIKENM_FX_SANITIZE: ``1`` uses the sanitizer build.
    SPIKENM_FX_REQUIRE_KERNELS: ``1`` lets ``pip install`` fail where it cannot compile.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import spikenm_fx.native
from spikenm_fx.native.toolchain import (
    BuildError,
    command_output,
    find_cmake,
    find_compiler,
    find_program,
    sanitizer_runtimes,
    toolchain_identity,
)

__all__ = ["Built", "build", "build_key", "cached_library", "source_hash"]

PROJECT = Path(__file__).parent
STAMP = "SOURCES"  # holds the hash of what the library beside it was compiled from

_log = logging.getLogger("spikenm_fx.native")


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled library and how it came to be.

    Attributes:
        path: of the shared library.
        origin: ``"wheel"`` (compiled when the package was installed), ``"cache"`` or ``"built"``.
    """

    path: Path
    origin: str


def library_name() -> str:
    """File name of the library on this platform."""
    return "libspikenm_kernels" + (".dll" if sys.platform == "win32" else ".so")


def wants_sanitizers() -> bool:
    """Whether the environment asks for the sanitizer build."""
    return os.environ.get("SPIKENM_FX_SANITIZE", "0") not in ("", "0")


def source_hash(project: Path = PROJECT) -> str:
    """SHA-256 of the kernels' sources, as ``CMakeLists.txt`` computes it.

    Args:
        project: folder with ``CMakeLists.txt`` and ``csrc``.
    """
    sources = sorted(p for p in (project / "csrc").iterdir() if p.suffix in (".cpp", ".h"))
    files = [*sources, project / "CMakeLists.txt"]
    hashes = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha256(hashes.encode()).hexdigest()


def build_key(compiler: list[str], *, sanitize: bool = False) -> str:
    """Name of a build in the cache: sources, compiler, its flags, architecture and C library.

    Args:
        compiler: the command.
        sanitize: of the sanitizer build.

    Raises:
        BuildError: if the compiler cannot be run.
    """
    parts = (source_hash(), *toolchain_identity(compiler), str(sanitize))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def cache_folder() -> Path:
    """Where compiled kernels are kept for this user."""
    chosen = os.environ.get("SPIKENM_FX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spikenm_fx"


def cached_library(*, sanitize: bool = False) -> Built:
    """The library of these sources: as installed, from the cache, or compiled now.

    Args:
        sanitize: the sanitizer build, which no installed package carries.

    Raises:
        BuildError: if there is none and it cannot be, or must not be, compiled.
    """
    installed = None if sanitize else _installed_library()
    if installed is not None:
        return Built(installed, "wheel")
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "the kernels are not compiled and no C++ compiler was found; install one, or name it "
            "in CXX, and run pip install again"
        )
    folder = cache_folder() / build_key(compiler, sanitize=sanitize)
    if (path := folder / library_name()).is_file():
        return Built(path, "cache")
    if os.environ.get("SPIKENM_FX_BUILD") == "0":
        raise BuildError("the kernels are not compiled, and SPIKENM_FX_BUILD=0 forbids it")
    with _one_at_a_time(folder):
        if path.is_file():
            return Built(path, "cache")
        return Built(build(folder, sanitize=sanitize), "built")


def _installed_library() -> Path | None:
    # An editable install has two folders: the sources, and where pip put what it compiled.
    for folder in spikenm_fx.native.__path__:
        library = Path(folder, "_native", library_name())
        stamp = library.with_name(STAMP)
        if library.is_file() and stamp.is_file() and stamp.read_text().strip() == source_hash():
            return library
    return None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock of a build; other processes and threads wait for it, and say that they do."""
    from filelock import FileLock, Timeout  # torch depends on it

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.warning("waiting for another process, which compiles the kernels")
            lock.acquire()  # which a process that ends gives back
    except (OSError, NotImplementedError) as error:
        raise BuildError(f"the kernels cannot be written to {folder}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def build(folder: Path, *, sanitize: bool = False) -> Path:
    """Compile every ISA level into ``folder``; the library appears there in one step.

    Args:
        folder: made if need be.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns:
        Path of the library.

    Raises:
        BuildError: if compiler or CMake are missing or fail, or ``folder`` cannot be written.
    """
    compiler, cmake = find_compiler(), find_cmake()
    if compiler is None:
        raise BuildError("no C++ compiler was found; install one, or name it in CXX")
    if cmake is None:
        raise BuildError(
            "the kernels are not compiled and no CMake was found: pip install cmake ninja, or "
            "install the package, which compiles them: pip install -e ."
        )
    _log.warning("compiling the kernels, once for these sources (about a minute)")
    start = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _run_cmake(cmake, Path(scratch), sanitize=sanitize)
            for name in (STAMP, library_name()):
                os.replace(Path(scratch, name), folder / name)
    except OSError as error:
        raise BuildError(f"the kernels cannot be written to {folder}: {error}") from error
    _log.info("compiled the kernels in %.0f s: %s", time.monotonic() - start, folder)
    return folder / library_name()


def _run_cmake(cmake: str, scratch: Path, *, sanitize: bool) -> None:
    configure = [cmake, "-S", str(PROJECT), "-B", str(scratch)]
    configure += [f"-DSPIKENM_SANITIZE={'ON' if sanitize else 'OFF'}"]
    if ninja := find_program("ninja"):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command_output(configure)
    command_output([cmake, "--build", str(scratch), "--parallel", str(os.cpu_count() or 1)])


def main() -> None:
    """Command line: compile into the cache and say where."""
    parser = argparse.ArgumentParser(prog="python -m spikenm_fx.native.build", description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="AddressSanitizer and UBSan")
    parser.add_argument("--preload", action="store_true", help="print what LD_PRELOAD must hold")
    parser.add_argument("--into", type=Path, help="folder, instead of the per-user cache")
    options = parser.parse_args()
    try:
        if options.preload:
            answer = sanitizer_runtimes()
        elif options.into:
            answer = str(build(options.into, sanitize=options.sanitize))
        else:
            answer = str(cached_library(sanitize=options.sanitize).path)
    except BuildError as error:
        sys.exit(f"{error}")
    sys.stdout.write(f"{answer}\n")


if __name__ == "__main__":
    main()
