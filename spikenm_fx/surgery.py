# SPDX-License-Identifier: Apache-2.0
"""The one way to change what a module does: its class becomes a subclass of its own, and back.

Masked layers, fused neurons and packed layers are made here.  What holds of all of them:

* The module keeps its identity, its attributes, parameters, buffers, hooks and children.
* ``isinstance(module, TheUsersClass)`` stays true, as the new class inherits from it; the mixin
  stands before the user's class, so that what it overrides counts and ``super()`` reaches the rest.
* The new class says what it stands for: name (with a prefix, if given), qualified name, module and
  docstring are those of the user's class, so that printing and tracebacks stay readable.
* It can be copied and pickled wherever the mixin can be imported and the module's state allows.
* Changing back leaves nothing behind: the user's class is untouched, never patched, and no cache
  keeps a class alive that nobody uses any more.
* Setting the class goes past ``__setattr__``, which some frameworks override to register what is
  set (rockpool).  Their modules may start from another class of C's making than ``nn.Module`` does;
  then Python lets the mixin come second only, and only the mixin's namespace counts before theirs.

A mixin that needs attributes made for each class gives them as a static method
``_class_namespace(plain, *key) -> dict``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn

__all__ = ["extend", "extended_class", "give_class", "plain_class", "restore", "why_not_extended"]

_PLAIN = "_spikenm_plain"

# The values inherit from the keys: were they held strongly, no key would ever go.
_classes: WeakKeyDictionary[type, WeakValueDictionary[Hashable, type]] = WeakKeyDictionary()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the user gave ``module``; of a module that was not extended, its class."""
    plain: type[nn.Module] = getattr(type(module), _PLAIN, type(module))
    return plain


def extend(module: nn.Module, mixin: type, key: tuple[Any, ...] = (), *, prefix: str = "") -> None:
    """Let ``module`` be of ``mixin`` as well, in place; of one extended before, only of this one.

    Args:
        module: any module.
        mixin: what the new class has before the user's own.
        key: arguments, after the plain class, of the mixin's ``_class_namespace``.
        prefix: of the new class's name.

    Raises:
        TypeError: if Python does not let the module's class be extended in place; the module is
            then as it was.
    """
    give_class(module, extended_class(plain_class(module), mixin, key, prefix=prefix))


def restore(module: nn.Module) -> None:
    """Give ``module`` its own class back; attributes that were set on it are left to the caller.

    Others extend a module's class in place as well, such as ``torch.nn.utils.parametrize``: what
    they have made of the extended class stays, of the plain one.
    """
    give_class(module, _restored(type(module)))


def _restored(cls: Any) -> Any:
    """The class as it would be had its module never been extended here."""
    if not hasattr(cls, _PLAIN):
        return cls
    if _PLAIN in vars(cls):
        return vars(cls)[_PLAIN]
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(map(_restored, cls.__bases__)), own)


def why_not_extended(module: nn.Module, mixin: type, *, leading: bool = False) -> str:
    """Why :func:`extend` would fail; "" where it would not.  The module stays as it is.

    Args:
        module: any module.
        mixin: the class to extend it with.
        leading: the mixin must come before the module's own class, to override its methods.
    """
    before, plain = type(module), plain_class(module)
    if leading and not _may_lead(plain):
        return f"{plain.__qualname__} does not start from nn.Module, so that nothing can precede it"
    try:
        extend(module, mixin)
    except TypeError as error:
        return f"the class {plain.__qualname__} cannot be extended in place ({error})"
    give_class(module, before)
    return ""


def give_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Set the class past the module's own ``__setattr__``.

    Raises:
        TypeError: if Python does not let it; the module is then as it was.
    """
    object.__setattr__(module, "__class__", to)


def extended_class(
    plain: type[nn.Module], mixin: type, key: tuple[Any, ...] = (), *, prefix: str = ""
) -> type[nn.Module]:
    """The class that is both; the same one for the same arguments while anybody uses it.

    Args:
        plain: the user's class.
        mixin: comes before it, where Python allows.
        key: arguments, after ``plain``, of the mixin's ``_class_namespace``.
        prefix: of the new class's name.

    Raises:
        TypeError: if no class can inherit from both.
    """
    made = _classes.setdefault(plain, WeakValueDictionary())
    found = made.get((mixin, key, prefix))
    if found is None:
        found = made[mixin, key, prefix] = _new_class(plain, mixin, key, prefix)
    return found


def _new_class(plain: type, mixin: type, key: tuple[Any, ...], prefix: str) -> type[nn.Module]:
    outer, dot, name = plain.__qualname__.rpartition(".")
    namespace = {
        _PLAIN: plain,
        "__module__": plain.__module__,
        "__qualname__": f"{outer}{dot}{prefix}{name}",
        "__doc__": plain.__doc__,
        **getattr(mixin, "_class_namespace", _no_namespace)(plain, *key),
    }
    bases = (mixin, plain) if _may_lead(plain) else (plain, mixin)
    made: Any = type(plain)(f"{prefix}{plain.__name__}", bases, namespace)

    def __reduce_ex__(module: Any, protocol: Any) -> Any:
        """How copying and pickling find the class again, which no Python file holds by its name."""
        reduced = super(made, module).__reduce_ex__(protocol)
        if type(module) is not made:  # extended further, by whoever did that
            return reduced
        return (_new_instance, (plain, mixin, key, prefix), *reduced[2:])

    made.__reduce_ex__ = __reduce_ex__
    extended: type[nn.Module] = made
    return extended


def _no_namespace(*_: Any) -> dict[str, Any]:
    return {}


def _may_lead(plain: type) -> bool:
    """Whether a mixin made from nn.Module may come first and instances still change to the class.

    They may only change to one that extends the same class of C's making.
    """
    solid: type | None = plain
    while solid is not None and solid is not nn.Module:
        solid = solid.__base__
    return solid is not None


def _new_instance(plain: Any, mixin: type, key: tuple[Any, ...], prefix: str) -> nn.Module:
    made: Any = extended_class(plain, mixin, key, prefix=prefix)
    instance: nn.Module = made.__new__(made)
    return instance
