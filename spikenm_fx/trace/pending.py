# SPDX-License-Identifier: Apache-2.0
"""A graph that completes itself when the model is first used."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from spikenm_fx.errors import TraceError
from spikenm_fx.trace.api import trace
from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["PendingGraph"]


class PendingGraph:
    """What the code tells now, and the whole graph after the model's first forward.

    The first call of ``model`` is traced on its own inputs, just before it runs; the hook that
    does this then removes itself.  A call that cannot be traced leaves ``graph`` as it is, and the
    reason in ``error``; the call itself goes on as ever.

    Args:
        model: the model, traced without example inputs to begin with.

    Attributes:
        graph: the best graph so far.
        error: why the first forward could not be traced, if it could not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.graph: SpikingGraph = trace(model)
        self.error: TraceError | None = None
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(
            self._learn, with_kwargs=True
        )

    @property
    def complete(self) -> bool:
        """Whether a forward has been traced."""
        return self.graph.route not in ("symbolic", "modules")

    def remove(self) -> None:
        """Stop waiting for a forward."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _learn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.remove()
        try:
            self.graph = trace(module, args, example_kwargs=kwargs)
        except TraceError as error:
            self.error = error
