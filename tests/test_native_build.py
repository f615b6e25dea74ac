# SPDX-License-Identifier: Apache-2.0
"""How the compiled library is found, compiled once for everybody who waits for it, and checked."""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spikenm_fx.native
from spikenm_fx.native import library as native_library
from spikenm_fx.native import toolchain
from spikenm_fx.native.build import (
    build_key,
    cached_library,
    library_name,
    source_hash,
    wants_sanitizers,
)
from spikenm_fx.native.library import MIRRORS, load_library, native_status
from spikenm_fx.native.mirror import (
    MirrorError,
    check_mirrors,
    compiled_layout,
    mirrored_layout,
)
from spikenm_fx.native.toolchain import BuildError

STATUS = native_status()
needs_kernels = pytest.mark.skipif(not STATUS.available, reason=f"no kernels: {STATUS.reason}")
posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in tools are shell scripts")
SOURCES = Path(spikenm_fx.native.__file__).parent
WAIT_S = 120


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _compiler(folder: Path, version: str = "c++ 12.2.0") -> Path:
    """A compiler that knows its version and nothing else."""
    return _script(
        folder / "tool-c++", f'[ "$1" = --version ] && echo "{version}" || echo x86_64-linux-gnu'
    )


def _cmake(folder: Path, build: str) -> None:
    """A CMake that configures nothing; building appends a line to ``calls`` and runs ``build``."""
    calls = folder / "calls"
    _script(
        folder / "cmake",
        f'if [ "$1" = --build ]; then echo built >> {calls}; scratch="$2"; {build}\n'
        f'else echo stamp > "$4/SOURCES"; fi',
    )


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder of stand-in tools, first on the path, and an empty cache beside it."""
    folder = tmp_path / "tools"
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("CXX", str(_compiler(folder)))
    monkeypatch.setenv("SPIKENM_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPIKENM_FX_BUILD", raising=False)
    monkeypatch.setattr(spikenm_fx.native, "__path__", [])  # nothing was compiled at install
    return folder


def _python(script: str) -> subprocess.Popen[str]:
    """Start an interpreter of its own with this package, wherever that lies."""
    path = os.pathsep.join([str(SOURCES.parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def _library_names(cache: Path) -> list[str]:
    return [path.parent.name for path in cache.rglob(library_name())]


@posix
def test_compiles_once_and_says_so(tools, tmp_path, caplog):
    """The first use compiles, with one line in the log; the second finds what it compiled."""
    _cmake(tools, f'echo library > "$scratch/{library_name()}"')
    with caplog.at_level(logging.WARNING, "spikenm_fx.native"):
        first = cached_library()
    assert first.origin == "built"
    assert first.path.read_text() == "library\n"
    assert ["compiling" in record.message for record in caplog.records] == [True]
    caplog.clear()
    assert cached_library().origin == "cache"
    assert not caplog.records
    assert (tools / "calls").read_text() == "built\n"


@posix
def test_processes_that_start_together_compile_once(tools, tmp_path):
    """The second process waits for the first one's library, and says that it waits."""
    go = tmp_path / "go"
    _cmake(
        tools,
        f"n=0; while [ ! -e {go} ] && [ $n -lt {10 * WAIT_S} ]; do sleep 0.1; n=$((n+1)); done; "
        f'echo library > "$scratch/{library_name()}"',
    )
    script = (
        "import spikenm_fx.native\n"
        "from spikenm_fx.native.build import cached_library\n"
        "spikenm_fx.native.__path__ = []\n"
        "print(cached_library().origin)"
    )
    processes = [_python(script) for _ in range(2)]
    said: list[str] = []

    def listen(process: subprocess.Popen) -> None:
        for line in process.stderr:
            said.append(line)
            if "waiting for another process" in line:
                go.touch()

    listeners = [threading.Thread(target=listen, args=(process,)) for process in processes]
    for thread in listeners:
        thread.start()
    for thread in listeners:
        thread.join(WAIT_S)
    origins = [process.stdout.read().strip() for process in processes]
    assert [process.wait(WAIT_S) for process in processes] == [0, 0], said
    assert sorted(origins) == ["built", "cache"]
    assert (tools / "calls").read_text() == "built\n"
    assert sum("compiling the kernels" in line for line in said) == 1
    assert sum("waiting for another process" in line for line in said) == 1


@posix
def test_a_failed_build_leaves_nothing_and_quotes_the_compiler(tools, tmp_path):
    """What the compiler said first is in the message, and the cache holds no half a library."""
    _cmake(tools, 'echo "noise"; echo "kernels.cpp:1: error: no such thing" >&2; exit 1')
    with pytest.raises(BuildError, match="error: no such thing") as caught:
        cached_library()
    assert "noise" not in str(caught.value)
    assert _library_names(tmp_path / "cache") == []


@posix
def test_compiling_can_be_forbidden(tools, monkeypatch):
    """SPIKENM_FX_BUILD=0 compiles nothing, and the reason names it."""
    _cmake(tools, f'echo library > "$scratch/{library_name()}"')
    monkeypatch.setenv("SPIKENM_FX_BUILD", "0")
    with pytest.raises(BuildError, match="SPIKENM_FX_BUILD=0"):
        cached_library()
    assert not (tools / "calls").exists()


@posix
@pytest.mark.parametrize("forbidden", [False, True])
def test_running_without_kernels_is_said_once(tools, monkeypatch, forbidden):
    """An install hides that nothing was compiled: the first use tells, unless asked for."""
    monkeypatch.setenv("CXX", str(tools / "nowhere"))
    if forbidden:
        monkeypatch.setenv("SPIKENM_FX_BUILD", "0")
    process = _python(
        "import spikenm_fx.native.build\n"
        "from spikenm_fx.pack import native_status\n"
        "spikenm_fx.native.__path__ = []\n"
        "print(native_status().available, native_status().available)"
    )
    answer, said = process.communicate(timeout=WAIT_S)
    assert answer.split() == ["False", "False"]
    assert said.count("run on torch alone: the kernels are not compiled") == (not forbidden)


@posix
@pytest.mark.parametrize(
    ("missing", "way_out"), [("compiler", "name it in CXX"), ("cmake", "pip install cmake")]
)
def test_missing_tools_are_named(tools, monkeypatch, missing, way_out):
    """Without compiler or CMake there are no kernels, and the reason says what to install."""
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _: str(tools))
    if missing == "compiler":
        monkeypatch.setenv("CXX", str(tools / "nowhere"))
    with pytest.raises(BuildError, match=way_out):
        cached_library()


@posix
def test_an_unwritable_cache_is_a_reason(tools, tmp_path, monkeypatch):
    """A cache that is a file cannot be written to, and the message names it."""
    _cmake(tools, f'echo library > "$scratch/{library_name()}"')
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(BuildError, match="cannot be written"):
        cached_library()


@posix
@pytest.mark.parametrize("same", [True, False])
def test_an_installed_library_serves_its_own_sources_only(tools, tmp_path, monkeypatch, same):
    """What pip compiled is used as long as the sources are those it was compiled from."""
    _cmake(tools, f'echo library > "$scratch/{library_name()}"')
    installed = tmp_path / "site-packages" / "_native"
    installed.mkdir(parents=True)
    (installed / library_name()).write_text("installed")
    (installed / "SOURCES").write_text((source_hash() if same else "0" * 64) + "\n")
    monkeypatch.setattr(spikenm_fx.native, "__path__", [str(SOURCES), str(installed.parent)])
    monkeypatch.setenv("SPIKENM_FX_CACHE", str(tmp_path / "cache"))
    assert cached_library().origin == ("wheel" if same else "built")


@posix
def test_the_key_knows_compiler_flags_and_c_library(tmp_path, monkeypatch):
    """Another compiler, another version, other flags, another libc, sanitizers: another build."""
    one = [str(_compiler(tmp_path / "a"))]
    keys = [build_key(one), build_key([str(_compiler(tmp_path / "b"))])]
    keys.append(build_key(one, sanitize=True))
    _compiler(tmp_path / "a", "c++ 13.1.0")
    keys.append(build_key(one))
    with monkeypatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O0")
        keys.append(build_key(one))
    with monkeypatch.context() as patch:
        patch.setattr(platform, "libc_ver", lambda: ("glibc", "2.17"))
        keys.append(build_key(one))
    assert len(set(keys)) == len(keys)
    assert build_key(one) == keys[3]


@given(data=st.data())
def test_the_hash_sees_every_source(tmp_path_factory, data):
    """A change in any source, or in how it is compiled, is another hash."""
    copy = tmp_path_factory.mktemp("native")
    shutil.copy(SOURCES / "CMakeLists.txt", copy)
    shutil.copytree(SOURCES / "csrc", copy / "csrc")
    assert source_hash(copy) == source_hash()
    chosen = data.draw(st.sampled_from(sorted(p for p in copy.rglob("*") if p.is_file())))
    chosen.write_bytes(chosen.read_bytes() + b"\n")
    assert source_hash(copy) != source_hash()


@needs_kernels
def test_cmake_and_python_hash_the_sources_alike():
    """The stamp that CMake writes beside the library is what Python compares it with."""
    assert Path(STATUS.path).with_name("SOURCES").read_text().strip() == source_hash()
    assert cached_library(sanitize=wants_sanitizers()).origin in ("wheel", "cache")


@needs_kernels
def test_every_structure_of_the_library_is_mirrored():
    """The library reports each mirrored structure, each field of it, and where it lies."""
    layouts = compiled_layout(ctypes.CDLL(STATUS.path))
    assert layouts == {name: mirrored_layout(mirror) for name, mirror in MIRRORS.items()}


@st.composite
def wrong_mirrors(draw):
    """One structure with a field missing, of another size, added, or two that changed places."""
    name = draw(st.sampled_from(sorted(MIRRORS)))
    fields = [(field, kind) for field, kind in MIRRORS[name]._fields_]
    at = draw(st.integers(0, len(fields) - 1))
    change = draw(st.sampled_from(["drop", "resize", "add", "swap"]))
    touched = fields[at][0]
    if change == "drop":
        del fields[at]
    elif change == "resize":
        fields[at] = (touched, ctypes.c_int64 * 3)
    elif change == "add":
        touched = "surplus"
        fields.insert(at, (touched, ctypes.c_int32))
    else:
        other = (at + 1) % len(fields)
        fields[at], fields[other] = fields[other], fields[at]
    return name, touched, type("Wrong", (ctypes.Structure,), {"_fields_": fields})


@needs_kernels
@given(wrong=wrong_mirrors())
def test_a_wrong_mirror_is_refused(wrong):
    """Any structure that Python writes otherwise than the library reads it is refused by name."""
    name, _, mirror = wrong
    with pytest.raises(MirrorError, match=name):
        check_mirrors(ctypes.CDLL(STATUS.path), MIRRORS | {name: mirror}, STATUS.path)


@needs_kernels
def test_the_refusal_names_the_field_and_its_places(monkeypatch):
    """Loading compares: what is reported is the field, both places, and what to do."""

    class Narrow(ctypes.Structure):
        _fields_ = [  # ctypes reads a plain list
            (name, ctypes.c_double if name == "absolute" else kind)
            for name, kind in MIRRORS["snm_draws"]._fields_
        ]

    monkeypatch.setitem(native_library.MIRRORS, "snm_draws", Narrow)
    said = r"snm_draws\.absolute is 4 bytes at \d+ in the library, 8"
    with pytest.raises(MirrorError, match=said):
        load_library(Path(STATUS.path))


@needs_kernels
@pytest.mark.parametrize("missing", sorted(MIRRORS))
def test_a_structure_without_a_mirror_is_refused(missing):
    """A structure that Python does not know is a difference like any other."""
    rest = {name: mirror for name, mirror in MIRRORS.items() if name != missing}
    with pytest.raises(MirrorError, match=rf"{missing}\S* is \d+ bytes at \d+ in the library, not"):
        check_mirrors(ctypes.CDLL(STATUS.path), rest, STATUS.path)
