# SPDX-License-Identifier: Apache-2.0
"""Tensors from code that no torch function shows: are they made of data, or constants?

``torch.from_numpy``, ``torch.FloatTensor(...)`` and the legacy ``Variable(...)`` make tensors
behind the tracer's back, and so may scripted helpers and extensions.  What these compute of data
reaches the dispatcher, which is watched here: as long as nothing there makes unknown tensors of
those of the trace, and none is handed out to numpy, a tensor that nobody knows is a constant, or
lies in the memory of a known one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from spikenm_fx._torch import DispatchMode, storage_id, storage_kept_apart, tree_flatten
from spikenm_fx.trace.execution.traced import Traced

__all__ = ["HANDING_OUT", "Unseen"]

HANDING_OUT = frozenset({Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr})
"""Functions after which data may come back from anywhere."""


class Unseen(DispatchMode):
    """Watches the dispatcher for data that goes where the tracer does not see.

    Attributes:
        used: whether any data has.
        looking: whether what the dispatcher shows now is none of the tracer's own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = False
        self.looking = True
        self._made: dict[int, tuple[fx.Node, object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.looking and not self.used and any(map(self._is_data, _tensors((args, kwargs)))):
            # what torch functions that this one calls have shown is a tensor of the trace
            self.used = not all(map(self._is_known, _tensors(out)))
        return out

    def _is_data(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Traced) or storage_id(tensor) in self._made

    def _is_known(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Traced) or self.node_of(tensor) is not None

    def made(self, tensor: Tensor, node: fx.Node) -> None:
        """Note that ``node`` made ``tensor``, of any shape, or wrote it last."""
        self._made[storage_id(tensor)] = (node, storage_kept_apart(tensor))

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node of what lies in the same memory as ``tensor``, of any shape, as a whole."""
        found = self._made.get(storage_id(tensor))
        if found is None:
            return None
        info = found[0].meta.get("value")
        return found[0] if info is not None and info.shape == tuple(tensor.shape) else None


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]
