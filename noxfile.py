# SPDX-License-Identifier: Apache-2.0
"""Every chore of the project, as the continuous integration runs it: ``python -m nox -s NAME``."""

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests", "lint", "types", "build"]
nox.options.default_venv_backend = "virtualenv"  # pip finds a local torch wheel, uv does not
nox.options.reuse_existing_virtualenvs = True

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # two workers on two cores
PROJECT = nox.project.load_toml("pyproject.toml")


def groups(*names: str) -> list[str]:
    """Requirements of the named dependency groups."""
    return list(nox.project.dependency_groups(PROJECT, *names))


def install_package(session: nox.Session) -> None:
    """The package itself, after its pinned dependencies, so that nothing replaces them."""
    session.install("-e", ".")


def install_with_frameworks(session: nox.Session) -> None:
    """Package, test tools and SNN frameworks; these without what would replace the pinned torch."""
    session.install(*groups("tests", "framework-requirements"))
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
    """All tests, with SpikingJelly, snnTorch and Norse installed."""
    install_with_frameworks(session)
    session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs, env=ONE_THREAD)


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
    kernels = [
        "tests/test_pack_kernels.py",
        "tests/test_pack_counts.py",
        "tests/test_native_sampler.py",
        "tests/test_permute_search.py",
    ]
    # A sanitizer ends the process: what pytest captures of its last words would be lost.
    visible = ("pytest", "-q", "--capture=sys")
    session.run("python", "-m", *visible, *(session.posargs or kernels), env=checked)


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
def bench(session: nox.Session) -> None:
    """Benchmarks: ``python -m nox -s bench -- sampler`` and the like; no argument lists them."""
    install_with_frameworks(session)
    session.run("python", "-m", "spikenm_fx.bench", *(session.posargs or ["--help"]))


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution and wheel, and the command line of the installed wheel."""
    session.install(*groups("build", "demo"))
    out = Path(session.create_tmp()) / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(out), ".")
    (wheel,) = out.glob("*.whl")
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(*groups("torch"), str(wheel))
    session.chdir(out)  # away from the sources: what runs is what was installed
    session.run("spikenm-fx", "--version")


@nox.session
def newest(session: nox.Session) -> None:
    """All tests, on the newest torch and torchvision that pip has."""
    tools = groups("tests", "framework-requirements")
    session.install("torch", "torchvision", *(t for t in tools if not t.startswith("torch==")))
    session.install("--no-deps", *groups("frameworks"))
    install_package(session)
    session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs, env=ONE_THREAD)
