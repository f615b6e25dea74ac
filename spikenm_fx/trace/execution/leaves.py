# SPDX-License-Identifier: Apache-2.0
"""What one attempt of a trace looks into, and how much it may take."""

from __future__ import annotations

import time

from torch import nn

from spikenm_fx._torch import NormBase, is_scripted
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace.execution.values import is_scripted_block

__all__ = ["ATOMIC", "NORMS", "LeafRule", "Limits", "TraceLimitReached"]

NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
ATOMIC = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""torch's own modules that hold weight matrices but compute with them in one fused call."""


class TraceLimitReached(RuntimeError):
    """The model ran past a limit of the trace; another route would as well."""


class Limits:
    """How much one attempt of a trace may take.

    Args:
        seconds: wall-clock time.
        nodes: recorded operations; a loop over T counts each step.
    """

    def __init__(self, seconds: float = 120.0, nodes: int = 200_000) -> None:
        self.seconds, self.nodes = seconds, nodes
        self._deadline = time.monotonic() + seconds

    def again(self) -> Limits:
        """The same limits from now on."""
        return Limits(self.seconds, self.nodes)

    def check(self, nodes: int) -> None:
        """Compare what was taken so far with the limits.

        Raises:
            TraceLimitReached: if either is passed.
        """
        if nodes > self.nodes:
            raise TraceLimitReached(f"more than {self.nodes} operations")
        if time.monotonic() > self._deadline:
            raise TraceLimitReached(f"more than {self.seconds:g} s")


class LeafRule:
    """Which modules the trace does not look into.

    Args:
        neurons: modules that are neurons.
        opaque: classes that failed under the tracer; they run under the recorder instead.
        unknown: those of ``neurons`` whose rule is not known in full: what they emit is measured.
    """

    def __init__(
        self,
        neurons: set[nn.Module],
        opaque: set[type[nn.Module]],
        unknown: set[nn.Module] | None = None,
    ) -> None:
        self.neurons, self.opaque, self.unknown = neurons, opaque, unknown or set()

    def __call__(self, module: nn.Module) -> bool:
        """Whether ``module`` is one node of the graph."""
        if module in self.neurons or is_weight_layer(module) or isinstance(module, NORMS + ATOMIC):
            return True
        if is_scripted(module):
            return not is_scripted_block(module)
        package = type(module).__module__
        # containers, empty ones too, and torch's composites (TransformerEncoderLayer) are opened
        container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if container or not package.startswith("torch.nn."):
            return False
        return not any(True for _ in module.children())
