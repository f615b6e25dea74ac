# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, one hypothesis profile, one stand-in for torchvision."""

import contextlib
import importlib
import sys
import types
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "spikenm_fx",
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("spikenm_fx")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


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
