# SPDX-License-Identifier: Apache-2.0
"""Channels that go together: put in the order in which N:M keeps most, or removed."""

from spikenm_fx.channels.permutation import (
    GroupOrder,
    Permutation,
    apply_permutation,
    permute,
    plan_permutation,
)
from spikenm_fx.channels.removal import (
    GroupRemoval,
    Removal,
    remove_channels,
    remove_dead_channels,
)
from spikenm_fx.channels.stored import load_smaller, save_smaller

__all__ = [
    "GroupOrder",
    "GroupRemoval",
    "Permutation",
    "Removal",
    "apply_permutation",
    "load_smaller",
    "permute",
    "plan_permutation",
    "remove_channels",
    "remove_dead_channels",
    "save_smaller",
]
