# SPDX-License-Identifier: Apache-2.0
"""The C++ compiler and CMake of this machine, and what of them a compiled library depends on."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = [
    "BuildError",
    "command_output",
    "find_cmake",
    "find_compiler",
    "find_program",
    "sanitizer_runtimes",
    "toolchain_identity",
]


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message holds the tool's own words."""


def find_program(name: str) -> str | None:
    """Path of a program: on the path, or installed by pip beside this interpreter."""
    scripts = sysconfig.get_path("scripts")
    return shutil.which(name) or shutil.which(name, path=scripts)


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none.

    ``CXX`` names it; else it is ``c++``, ``g++`` or ``clang++``, in the order of CMake.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        return command if shutil.which(command[0]) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def find_cmake() -> str | None:
    """Path of CMake, or None where there is none."""
    return find_program("cmake")


def toolchain_identity(compiler: list[str]) -> tuple[str, ...]:
    """What a compiled library depends on besides its sources.

    Args:
        compiler: the command.

    Returns:
        The compiler's own name, version and target, the flags that CMake takes from the
        environment, architecture, system and C library.

    Raises:
        BuildError: if the compiler cannot be run.
    """
    version = command_output([*compiler, "--version"]).splitlines()[:1]
    target = command_output([*compiler, "-dumpmachine"]).strip()
    flags = (os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", ""))
    machine = (platform.machine(), sys.platform)
    return (shlex.join(compiler), *version, target, *flags, *machine, *_c_library())


def _c_library() -> tuple[str, ...]:
    # The interpreter's triplet tells musl from glibc, of which libc_ver knows the version.
    return (str(sysconfig.get_config_var("MULTIARCH")), *platform.libc_ver())


def command_output(command: list[str]) -> str:
    """Run a tool and return what it printed.

    Raises:
        BuildError: if it cannot be run, or fails.
    """
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\nfailed:\n{_errors_of(done.stdout)}")
    return done.stdout


def _errors_of(output: str) -> str:
    # The first error explains the rest; without one, the end of the output does.
    at = output.lower().find("error")
    start = output.rfind("\n", 0, at) + 1
    return output[start:][:4000] if at >= 0 else output[-4000:]


def sanitizer_runtimes() -> str:
    """The sanitizer libraries that must be preloaded into Python, as LD_PRELOAD wants them.

    Raises:
        BuildError: if no compiler is found, or it cannot be run.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found; install one, or name it in CXX")
    # libstdc++ too: its interceptors must find it loaded, which Python alone does not do.
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = (command_output([*compiler, f"-print-file-name={name}"]).strip() for name in names)
    return ":".join(str(Path(path).resolve()) for path in found if Path(path).is_file())
