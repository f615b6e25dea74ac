# SPDX-License-Identifier: Apache-2.0
"""Every chore of the project, as the continuous integration runs it: ``python -m nox -s NAME``."""

import re
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint", "types", "wheel"]
nox.options.default_venv_backend = "virtualenv"  # pip finds a local torch wheel, uv does not
nox.options.reuse_existing_virtualenvs = True

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # two workers on two cores
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}  # Python, once for all the processes that tests start
ALL_INSTALLED = {"SPIKENM_FX_ALL_INSTALLED": "1"}  # a test that skips for a package fails
TWO_WORKERS = ("-n", "2", "--dist", "worksteal")
NO_BUILD = {"SPIKENM_FX_BUILD": "0"}  # only what was compiled at install
KERNEL_TESTS = (
    "tests/test_pack_kernels.py",
    "tests/test_pack_counts.py",
    "tests/test_native_sampler.py",
    "tests/test_permute_search.py",
    *sorted(map(str, Path("tests").glob("test_program*.py"))),
    "tests/test_small.py",
)
WHEEL_TESTS = ("tests/test_pack_kernels.py",)  # no framework needed
PROJECT = nox.project.load_toml("pyproject.toml")


def groups(*names: str) -> list[str]:
    """Requirements of the named dependency groups."""
    return list(nox.project.dependency_groups(PROJECT, *names))


def documented() -> list[str]:
    """Modules that the API pages show: the public ones of the library, without its programs."""
    hidden = re.compile(r"[/.]_|spikenm_fx/(bench|cli|demo|native)/")
    files = [file for file in Path("spikenm_fx").rglob("*.py") if not hidden.search(str(file))]
    packages = [file.parent for file in Path("spikenm_fx").rglob("__init__.py")]
    # Of a package without __all__ pdoc shows the modules by itself.
    listed = {p for p in packages if "__all__" in (p / "__init__.py").read_text(encoding="utf-8")}
    modules = [f.with_suffix("") for f in files] + packages
    shown = [m for m in modules if m.parent in listed and not hidden.search(f"{m}/")]
    return ["spikenm_fx", *sorted(".".join(module.parts) for module in shown)]


def install_package(session: nox.Session) -> None:
    """The package itself, after its pinned dependencies, so that nothing replaces them."""
    session.install("-e", ".")


def install_with_frameworks(session: nox.Session) -> None:
    """Package, test tools and SNN frameworks; these without what would replace the pinned torch."""
    session.install(*groups("tests", "framework-requirements", "export"))
    session.install("--no-deps", *groups("frameworks"))
    install_package(session)


@nox.session
def demo(session: nox.Session) -> None:
    """Watch a spiking network learn digits dense, at 2:4 and at 1:8 (minutes)."""
    session.install(*groups("demo"))
    install_package(session)
    session.run("spikenm-fx", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, with every SNN framework installed; none may be skipped for a missing package.

    ``-- --hypothesis-profile thorough`` tries each property with all of its examples, not a share.
    """
    install_with_frameworks(session)
    checked = ONE_THREAD | COMPILED | ALL_INSTALLED
    session.run("pytest", *TWO_WORKERS, *session.posargs, env=checked)


@nox.session
def unit(session: nox.Session) -> None:
    """One quick look while working: torch and pytest, no framework, no slow test."""
    session.install(*groups("unit"))
    session.install("-e", ".[cli]")
    few = ("-m", "not slow and not framework", "--hypothesis-profile", "quick")
    session.run("pytest", "-q", *TWO_WORKERS, *few, *session.posargs, env=ONE_THREAD | COMPILED)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    install_with_frameworks(session)
    checked = ONE_THREAD | {"SPIKENM_FX_SANITIZE": "1"}
    session.run("python", "-m", "spikenm_fx.native.build", "--sanitize", env=checked)
    runtime = session.run("python", "-m", "spikenm_fx.native.build", "--preload", silent=True)
    checked |= {
        "LD_PRELOAD": str(runtime).strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself never frees everything
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    # A sanitizer ends the process: what pytest captures of its last words would be lost.
    visible = ("pytest", "-q", "--capture=sys", "--hypothesis-profile", "quick")
    session.run("python", "-m", *visible, *(session.posargs or KERNEL_TESTS), env=checked)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, as checker and as formatter."""
    session.install(*groups("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    session.install(*groups("types"))
    install_package(session)
    session.run("mypy", *session.posargs)


@nox.session
def tutorials(session: nox.Session) -> None:
    """Run every tutorial from top to bottom."""
    install_with_frameworks(session)
    for tutorial in session.posargs or sorted(map(str, Path("tutorials").glob("*.py"))):
        session.run("python", tutorial, env=ONE_THREAD)


@nox.session
def docs(session: nox.Session) -> None:
    """API pages from the docstrings, in ``build/docs``: open ``index.html``."""
    session.install(*groups("docs"))
    session.install("-e", ".[cli]")
    out = Path("build") / "docs"
    shutil.rmtree(out, ignore_errors=True)
    options = ("--docformat", "google", "--no-show-source", "--output-directory", str(out))
    session.run("pdoc", *options, *documented())
    for page in out.rglob("*.html"):  # it leaves Sphinx's sign for a short name where it is
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace("<code>~", "<code>"), encoding="utf-8")
    session.log(f"open {(out / 'index.html').resolve()}")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks: ``python -m nox -s bench -- sampler`` and the like; no argument lists them."""
    install_with_frameworks(session)
    session.run("python", "-m", "spikenm_fx.bench", *(session.posargs or ["--help"]))


@nox.session
def gpu(session: nox.Session) -> None:
    """Step time, launches and agreement with the CPU on a CUDA device; says where there is none.

    It uses the torch that is there, which ``--no-venv`` makes that of the calling environment.
    """
    if session.virtualenv.is_sandboxed:
        install_package(session)
    session.run("python", "-m", "spikenm_fx.bench", "gpu", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Source distribution and manylinux wheel; the wheel's kernels in a clean environment."""
    session.install(*groups("wheel"))
    built, repaired = empty_folders(session, "dist", "manylinux")
    session.run(
        *("python", "-m", "build", "--outdir", str(built), "."),
        env={"SPIKENM_FX_REQUIRE_KERNELS": "1"},
    )
    (platform_wheel,) = built.glob("*.whl")
    session.run("auditwheel", "show", str(platform_wheel))
    session.run("auditwheel", "repair", "--wheel-dir", str(repaired), str(platform_wheel))
    (portable,) = repaired.glob("*manylinux*.whl")
    python = clean_environment(session, portable, "pytest", "hypothesis")
    status = kernel_status(session, python)
    if "origin='wheel'" not in status:
        session.error(f"the wheel carries no kernels: {status}")
    tests = [str(Path(test).resolve()) for test in WHEEL_TESTS]
    session.chdir(python.parent.parent)  # away from the sources: what runs is what was installed
    session.run(
        *(str(python), "-m", "pytest", "-q", *tests), external=True, env=ONE_THREAD | NO_BUILD
    )


@nox.session
def runtime(session: nox.Session) -> None:
    """Libspikenm and spikenm-run: built and installed by CMake alone, and what they depend on."""
    session.install("cmake", "ninja")
    build, prefix = empty_folders(session, "runtime", "runtime-installed")
    options = ("-DSPIKENM_RUNTIME=ON", "-G", "Ninja", "-S", "spikenm_fx/native", "-B", str(build))
    session.run("cmake", *options)
    session.run("cmake", "--build", str(build))
    session.run("cmake", "--install", str(build), "--prefix", str(prefix), "--strip")
    library, program = (prefix / "lib" / "libspikenm.so").resolve(), prefix / "bin" / "spikenm-run"
    size = library.stat().st_size + program.stat().st_size
    if size > 2 << 20:
        session.error(f"the runtime takes {size} bytes; 2 MiB are promised")
    needed = str(session.run("ldd", str(program), external=True, silent=True))
    known = ("linux-vdso", "libspikenm", "libstdc++", "libm.", "libgcc_s", "libc.", "ld-linux")
    others = [line for line in needed.splitlines() if not any(name in line for name in known)]
    if others:
        session.error(f"spikenm-run needs more than the C and C++ libraries: {others}")
    session.run(str(program), "--help", external=True)
    example = ("tutorials/07_stream_in_c.c", f"-I{prefix}/include", f"-L{prefix}/lib", "-lspikenm")
    session.run("cc", *example, "-o", str(build / "stream"), external=True)


@nox.session
def without_compiler(session: nox.Session) -> None:
    """Where nothing compiles the package installs, says so, and runs on torch's layers."""
    session.install(*groups("wheel"))
    built, empty = empty_folders(session, "dist", "cache")
    said = session.run(
        *("python", "-m", "build", "--wheel", "--outdir", str(built), "."),
        silent=True,
        env={"PATH": session.bin, "CXX": "/nowhere/c++"},  # CMake looks in /usr/bin by itself
    )
    if "WITHOUT its compiled kernels" not in str(said):
        session.error(f"the build does not say that the kernels are left out:\n{said}")
    (pure,) = built.glob("*-none-any.whl")
    python = clean_environment(session, pure, again=True)
    status = kernel_status(session, python, SPIKENM_FX_CACHE=str(empty))
    if "available=False" not in status:
        session.error(f"there should be no kernels: {status}")
    session.run(str(python.with_name("spikenm-fx")), "--version", external=True)


@nox.session
def aarch64(session: nox.Session) -> None:
    """Cross-compile for 64-bit Arm, and compare what it computes with x86, bit for bit.

    Needs Debian's g++-aarch64-linux-gnu, and qemu-user to run it; prints how many instructions the
    hot loops take.
    """
    session.install("cmake", "ninja")
    install_with_frameworks(session)
    build, prefix = empty_folders(session, "aarch64", "aarch64-installed")
    source = Path("spikenm_fx/native").resolve()
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={source / 'aarch64-linux-gnu.cmake'}"
    options = ("-G", "Ninja", "-DSPIKENM_RUNTIME=ON", toolchain)
    session.run("cmake", "-S", str(source), "-B", str(build), *options)
    session.run("cmake", "--build", str(build))
    session.run("cmake", "--install", str(build), "--prefix", str(prefix))
    library = prefix / "lib" / "libspikenm.so"
    header = library.read_bytes()[:20]
    elf_class, machine = header[4], int.from_bytes(header[18:20], "little")
    if header[:4] != b"\x7fELF" or (elf_class, machine) != (2, 183):
        session.error(f"not a 64-bit Arm library: class {elf_class}, machine {machine}")
    compiler = ("aarch64-linux-gnu-g++", "-std=c++17", "-O2", "-Wall", "-Werror")
    driver = ("tests/kernel_driver.cpp", f"-I{source / 'csrc'}", f"-L{prefix / 'lib'}")
    link = ("-lspikenm", "-Wl,-rpath,$ORIGIN/../lib", "-o", str(prefix / "bin" / "kernel_driver"))
    session.run(*compiler, *driver, *link, external=True)
    found = ONE_THREAD | {"SPIKENM_FX_AARCH64": str((prefix / "bin").resolve())}
    tests = session.posargs or ("tests/test_aarch64.py",)
    session.run("python", "-m", "pytest", "-q", *tests, env=found)
    session.run("python", "-m", "spikenm_fx.bench", "instructions", str(library))


@nox.session
def newest(session: nox.Session) -> None:
    """Unit tests and SpikingJelly's real models, on the newest torch and torchvision of pip."""
    tools = groups("tests", "framework-requirements", "export")
    session.install("torch", "torchvision", *(t for t in tools if not t.startswith("torch==")))
    session.install("--no-deps", *groups("frameworks"))
    install_package(session)
    quick = ("pytest", "-q", *TWO_WORKERS, "--hypothesis-profile", "quick")
    if session.posargs:
        session.run(*quick, *session.posargs, env=ONE_THREAD)
        return
    session.run(*quick, "-m", "not slow and not framework", env=ONE_THREAD)
    session.run(*quick, "tests/test_frameworks.py", "-k", "SpikingJelly", env=ONE_THREAD)


def empty_folders(session: nox.Session, *names: str) -> list[Path]:
    """Folders in the session's temporary one, without what an earlier run left there."""
    folders = [Path(session.create_tmp()).resolve() / name for name in names]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    return folders


def clean_environment(session: nox.Session, wheel: Path, *others: str, again: bool = False) -> Path:
    """Interpreter of a new environment with this wheel and what it depends on, nothing else.

    ``again``: of the one that another session made, if one did, with this wheel for its own: an
    installation of torch less.
    """
    folder = Path(session.cache_dir).resolve() / "clean"
    python = folder / "bin" / "python"
    pip = (str(python), "-m", "pip")
    if again and python.exists():
        session.run(*pip, "uninstall", "--quiet", "--yes", "spikenm_fx", external=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        session.run("python", "-m", "venv", str(folder))
    wanted = (*groups("torch"), *others, f"{wheel}[cli]")
    session.run(*pip, "install", "--quiet", *wanted, external=True)
    return python


def kernel_status(session: nox.Session, python: Path, **environment: str) -> str:
    """What the package in an environment says about its kernels, having compiled none."""
    script = "from spikenm_fx.pack import native_status; print(native_status())"
    command = (str(python), "-P", "-c", script)  # -P: not the sources in this folder
    said = session.run(*command, silent=True, external=True, env=NO_BUILD | environment)
    status = str(said).strip()
    session.log(status)
    return status
