# SPDX-License-Identifier: Apache-2.0
"""Changing a module's class and back: identity stays, printing is readable, nothing leaks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikenm_fx import surgery


class Doubling(nn.Module):
    """What the tests extend modules with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Twice what the module itself computes."""
        return 2 * super().forward(*args, **kwargs)


class Marked(nn.Module):
    """A mixin with attributes of its own for each class."""

    @staticmethod
    def _class_namespace(plain: type, *key: str) -> dict[str, Any]:
        return {"mark": f"{plain.__name__} {' '.join(key)}"}


class Outer:
    """Holds a class whose qualified name has a dot."""

    class Layer(nn.Linear):
        """A layer of the user's."""


def test_the_module_stays_itself() -> None:
    """Identity, attributes, parameters and hooks stay; the forward is the new one; and back."""
    layer, x = Outer.Layer(4, 3), torch.rand(2, 4)
    layer.note = "mine"
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("ran"))
    before, names = layer(x), [name for name, _ in layer.named_parameters()]
    surgery.extend(layer, Doubling)
    torch.testing.assert_close(layer(x), 2 * before)
    assert isinstance(layer, Outer.Layer)
    assert isinstance(layer, Doubling)
    assert (layer.note, calls, layer.in_features) == ("mine", ["ran", "ran"], 4)
    assert [name for name, _ in layer.named_parameters()] == names
    surgery.restore(layer)
    assert type(layer) is Outer.Layer
    assert torch.equal(layer(x), before)


def test_the_class_says_what_it_stands_for() -> None:
    """Name, qualified name, module and docstring are those of the user's class."""
    layer = Outer.Layer(4, 3)
    shown = repr(layer)
    surgery.extend(layer, Doubling)
    assert repr(layer) == shown
    cls = type(layer)
    assert (cls.__module__, cls.__qualname__, cls.__doc__) == (
        Outer.Layer.__module__,
        "Outer.Layer",
        "A layer of the user's.",
    )
    surgery.extend(layer, Marked, ("a", "b"), prefix="Marked")
    assert type(layer).__qualname__ == "Outer.MarkedLayer"
    assert type(layer).mark == "Layer a b"
    assert not isinstance(layer, Doubling)
    assert surgery.plain_class(layer) is Outer.Layer


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_extended_modules_can_be_copied_and_pickled(again: Any) -> None:
    """The copy is of the same class, has its own parameters, and can be changed back."""
    layer, x = nn.Linear(4, 3), torch.rand(2, 4)
    surgery.extend(layer, Marked, ("a",), prefix="Marked")
    twin = again(layer)
    assert type(twin) is type(layer)
    assert twin.weight is not layer.weight
    assert torch.equal(twin(x), layer(x))
    surgery.restore(twin)
    assert type(twin) is nn.Linear


def test_no_class_is_kept_alive() -> None:
    """Classes made in a notebook cell or a function go when nobody uses them any more."""

    def made() -> weakref.ref[type]:
        class Local(nn.Linear):
            pass

        layer = Local(2, 2)
        surgery.extend(layer, Doubling)
        assert surgery.extended_class(Local, Doubling) is type(layer)
        return weakref.ref(Local)

    gone = made()
    gc.collect()
    assert gone() is None
    assert not any("Local" in cls.__qualname__ for cls in nn.Linear.__subclasses__())


class Registering(nn.Module):
    """Like rockpool: whatever is set as an attribute is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["seen"] = []

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.setdefault("seen", []).append(name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """As it is."""
        return x


def test_frameworks_that_watch_attributes_do_not_see_it() -> None:
    """Setting the class is no assignment that a framework could register."""
    module = Registering()
    seen = list(module.seen)
    surgery.extend(module, Doubling)
    surgery.restore(module)
    assert module.seen == seen


def test_rockpool_modules_are_extended_too() -> None:
    """They do not start from nn.Module: the mixin comes second, and this is said to who asks."""
    pytest.importorskip("rockpool")
    from rockpool.nn.modules import LinearTorch

    layer = LinearTorch((4, 3))
    plain = type(layer)
    surgery.extend(layer, Marked, ("a",), prefix="Marked")
    assert isinstance(layer, plain)
    assert isinstance(layer, Marked)
    assert type(layer).mark.endswith(" a")
    surgery.restore(layer)
    assert type(layer) is plain
    assert surgery.why_not_extended(layer, Marked) == ""
    assert "nn.Module" in surgery.why_not_extended(layer, Doubling, leading=True)


def test_what_cannot_be_extended_stays_as_it_was() -> None:
    """A class of another layout in memory is refused with the reason."""

    class Slotted(nn.Module):
        __slots__ = ("extra",)

    class Other(nn.Module):
        __slots__ = ("more",)

    module = Slotted()
    assert "cannot be extended" in surgery.why_not_extended(module, Other)
    with pytest.raises(TypeError):
        surgery.extend(module, Other)
    assert type(module) is Slotted
