# SPDX-License-Identifier: Apache-2.0
"""Learnable N:M sparsity for spiking neural networks.

``sparsify`` a model, train it with your own loop, ``fold`` it, ``verify`` it, ``pack`` it.  ``n:m``
always means *keep at most n of m* consecutive input channels.
"""

from spikenm_fx.channels import permute, remove_channels, remove_dead_channels
from spikenm_fx.errors import SpikeNMError
from spikenm_fx.fold import dense_state_dict, fold
from spikenm_fx.masks.sparsify import param_groups, sparsify
from spikenm_fx.pack.api import pack
from spikenm_fx.pattern import NM
from spikenm_fx.plan.plan import Plan, plan
from spikenm_fx.plan.rules import Rule
from spikenm_fx.recipe.schema import load_recipe
from spikenm_fx.report.data import Report
from spikenm_fx.report.measure import report
from spikenm_fx.trace.api import trace
from spikenm_fx.trace.graph import SpikingGraph
from spikenm_fx.verify import Verification, verify

__all__ = [
    "NM",
    "Plan",
    "Report",
    "Rule",
    "SpikeNMError",
    "SpikingGraph",
    "Verification",
    "dense_state_dict",
    "fold",
    "load_recipe",
    "pack",
    "param_groups",
    "permute",
    "plan",
    "remove_channels",
    "remove_dead_channels",
    "report",
    "sparsify",
    "trace",
    "verify",
]
