# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, one hypothesis profile, marks, a stand-in for torchvision."""

import contextlib
import functools
import gc
import importlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings
from profiles import USUAL

settings.load_profile(USUAL)
torch.set_num_threads(1)
# Inductor compiles a program for each instruction set that the processor names, to see whether it
# runs: half of the time of a small model's compilation.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

FRAMEWORKS = re.compile(
    r"\b(spikingjelly|snntorch|norse|sinabs|rockpool|braincog|timm|neurobench)\b"
)
LISTING = "snntorch._neurons.neurons"  # out of the fixture, which would mark all tests with it
MISSING = re.compile(r"could not import|not installed|No module named")
ALL_INSTALLED = os.environ.get("SPIKENM_FX_ALL_INSTALLED") == "1"
"""Set by the sessions that install everything: there a test that skips for a package has failed."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs an SNN framework: its parameters, code, fixtures or helpers name one.

    Files that are slow as a whole come first, so that no worker ends long after the others.
    """
    for item in items:
        if isinstance(item, pytest.Function) and _names_framework(item):
            item.add_marker("framework")
    slow = {item.path for item in items if item.parent and item.parent.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What imports have made stays: collections that tests ask for need not look at it again."""
    gc.collect()
    gc.freeze()


def _names_framework(item: pytest.Function) -> bool:
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(isinstance(value, str) and FRAMEWORKS.search(value) for value in parameters):
        return True
    known = item._fixtureinfo.name2fixturedefs
    fixtures = [known[name][-1].func for name in item.fixturenames if name in known]
    return any(map(_mentions_framework, (item.function, *fixtures)))


@functools.cache
def _mentions_framework(function: Callable) -> bool:
    return any(map(FRAMEWORKS.search, _strings(function)))


def _strings(function: Callable) -> Iterator[str]:
    """Texts and imports of a function and of the functions of its file that it calls."""
    waiting, seen = [function], set()
    while waiting:
        code = getattr(waiting.pop(), "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        yield from code.co_names
        yield from (c for c in code.co_consts[1:] if isinstance(c, str))  # 0 is the docstring
        own = getattr(function, "__globals__", {})
        waiting += [own[n] for n in code.co_names if _of_this_file(own.get(n), function)]


def _of_this_file(value: object, function: Callable) -> bool:
    return getattr(value, "__module__", None) == function.__module__


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A skip for a missing package fails where all are installed, and where it is not marked."""
    report = yield
    reason = str(report.longrepr[2]) if report.skipped and not hasattr(report, "wasxfail") else ""
    if not MISSING.search(reason):
        return report
    if ALL_INSTALLED:
        report.outcome, report.longrepr = "failed", f"all packages are installed here, but {reason}"
    elif FRAMEWORKS.search(reason) and item.get_closest_marker("framework") is None:
        report.outcome, report.longrepr = "failed", f"mark it with pytest.mark.framework: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """The same for files that are skipped as a whole."""
    report = yield
    if ALL_INSTALLED and report.skipped and MISSING.search(str(report.longrepr[2])):
        report.outcome = "failed"
        report.longrepr = f"all packages are installed here, but {report.longrepr[2]}"
    return report


@pytest.fixture(autouse=True, scope="session")
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder of this run, for what one of its processes makes for all of them."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    shared = base / "shared"
    shared.mkdir(exist_ok=True)
    os.environ["SPIKENM_FX_TEST_RUN"] = str(shared)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_neurons_of_other_tests() -> Iterator[None]:
    """All neurons that a process has made are on a list of snnTorch, and looked at all the time."""
    yield
    neurons = sys.modules.get(LISTING)
    if neurons is not None:
        listed = neurons.SpikingNeuron.instances
        listed[:] = [n for n in listed if sys.getrefcount(n) > 3]  # more than list, name, argument


@pytest.fixture
def torchvision_stub(monkeypatch: pytest.MonkeyPatch):
    """SpikingJelly's model files import one function of torchvision; no test calls it.

    The real one is used where it is installed and works: beside another build of torch than its
    own it fails at import.
    """
    if find_spec("torchvision") is not None:
        with contextlib.suppress(Exception):
            importlib.import_module("torchvision")
            return
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
    package = types.ModuleType("torchvision")
    package.__path__ = []
    inner = types.ModuleType("torchvision._internally_replaced_utils")

    def load_state_dict_from_url(*_: object, **__: object) -> None:
        raise RuntimeError("tests download nothing")

    inner.load_state_dict_from_url = load_state_dict_from_url
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision._internally_replaced_utils", inner)
