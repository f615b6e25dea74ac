# SPDX-License-Identifier: Apache-2.0
"""One small file per framework; none of them imports the framework it is about."""

from spikenm_fx.trace.neurons.adapters import (
    braincog,
    lava,
    norse,
    rockpool,
    sinabs,
    snntorch,
    spikingjelly,
)
from spikenm_fx.trace.neurons.adapters.adapter import Adapter

__all__ = ["ADAPTERS", "Adapter"]

ADAPTERS: tuple[Adapter, ...] = (
    spikingjelly.ADAPTER,
    snntorch.ADAPTER,
    norse.ADAPTER,
    sinabs.ADAPTER,
    braincog.ADAPTER,
    rockpool.ADAPTER,
    lava.ADAPTER,
)
