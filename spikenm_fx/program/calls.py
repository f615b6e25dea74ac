# SPDX-License-Identifier: Apache-2.0
"""One recorded operation with its operands, for those that lower it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, fx

from spikenm_fx.program.axes import Atom
from spikenm_fx.program.draft import Draft, NotLowered, Ref, Rest
from spikenm_fx.program.neurons import Returned

__all__ = ["Call", "Function", "Lowered"]


class Call:
    """One recorded operation with its operands.

    Args:
        draft: of the program.
        node: as recorded.
        where: for messages.
        args: positional arguments, tensors as :class:`Ref`.
        kwargs: the others.
        shape: of the result; None where it is no tensor.
    """

    def __init__(
        self,
        draft: Draft,
        node: fx.Node,
        where: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shape: tuple[int, ...] | None,
    ) -> None:
        self.draft, self.node, self.where, self.shape = draft, node, where, shape
        self.args, self.kwargs = args, kwargs

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def refuse(self, why: str, inside: tuple[Atom, ...] = ()) -> NotLowered:
        """The error for this operation.

        Args:
            why: a sentence.
            inside: axes of the batch for which it does not hold where they are axes of each token.
        """
        carries = any(isinstance(x, Rest) for x in self.args)
        return NotLowered(self.where, why, carries=carries, inside=inside)

    def ref(self, place: int = 0) -> Ref:
        """A tensor argument.

        Raises:
            NotLowered: if it is something else.
        """
        given = self.args[place] if len(self.args) > place else None
        if isinstance(given, Returned):
            given = given.spikes
        if not isinstance(given, Ref):
            what = "a parameter or constant" if isinstance(given, Tensor) else repr(given)
            why = f"it works on {what}, which is no value of the program"
            raise NotLowered(self.where, why, carries=isinstance(given, Rest))
        return given


Lowered: TypeAlias = Any
Function: TypeAlias = Callable[[Call], Lowered]
