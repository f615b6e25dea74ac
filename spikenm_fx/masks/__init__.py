# SPDX-License-Identifier: Apache-2.0
"""Learn masks: inject them, sample them, know them again."""

from spikenm_fx.masks.attach import MaskedLayer, masked_layers
from spikenm_fx.masks.eid import EID
from spikenm_fx.masks.eid.loss import eid_loss
from spikenm_fx.masks.hooks import step
from spikenm_fx.masks.progress import Progress, progress
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.masks.sparsify import param_groups, sparsify

__all__ = [
    "EID",
    "MaskedLayer",
    "Progress",
    "Schedule",
    "eid_loss",
    "masked_layers",
    "param_groups",
    "progress",
    "sparsify",
    "step",
]
