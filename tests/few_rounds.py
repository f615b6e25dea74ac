# SPDX-License-Identifier: Apache-2.0
"""For tests of what a packed network computes, which do not ask how fast any of its forms is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from torch import nn

from spikenm_fx.pack import forms, packing, turns
from spikenm_fx.pack.engine import choose

__all__ = ["fastest_of", "few_rounds", "hurried"]


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """What ``pack`` times takes one turn that counts, where it goes on for half a second."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (choose, forms, turns):
            patch.setattr(module, "rounds", lambda *_: iter((False, True)))
        yield


@pytest.fixture
def few_rounds() -> Iterator[None]:
    """The whole test is :func:`hurried`."""
    with hurried():
        yield


def fastest_of(engine: nn.Module) -> dict[str, str]:
    """By layer what was measured to be fastest in it, whatever the whole forward gains by that."""
    times = {row.name: row.milliseconds for row in packing(engine).layers}
    return {name: min(ways, key=ways.__getitem__) for name, ways in times.items()}
