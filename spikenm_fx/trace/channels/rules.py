# SPDX-License-Identifier: Apache-2.0
"""All rules of channel spaces: importing this registers them."""

from spikenm_fx.trace.channels import parts, rules_axes, rules_layers
from spikenm_fx.trace.channels.reader import ChannelReader
from spikenm_fx.trace.execution.record import Trace

__all__ = ["RULES_OF", "read_channels"]

RULES_OF = (rules_axes, parts, rules_layers)
"""The modules that hold rules."""


def read_channels(trace: Trace) -> ChannelReader:
    """Every operation of ``trace`` read by its rule."""
    reader = ChannelReader(trace)
    reader.read()
    return reader
