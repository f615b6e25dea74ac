# SPDX-License-Identifier: Apache-2.0
"""Learnable N:M sparsity for spiking neural networks.

``sparsify`` a model, train it with your own loop, ``fold`` it, ``verify`` it, ``pack`` it.  ``n:m``
always means *keep at most n of m* consecutive input channels.

Each name is imported when it is first used: the command line prints its help without torch.
"""

from typing import TYPE_CHECKING

from spikenm_fx._lazy import attach

if TYPE_CHECKING:
    from spikenm_fx.doctor import Diagnosis, doctor
    from spikenm_fx.errors import SpikeNMError
    from spikenm_fx.fold import dense_state_dict, fold
    from spikenm_fx.masks.sparsify import param_groups, sparsify
    from spikenm_fx.pack.api import pack
    from spikenm_fx.pattern import NM
    from spikenm_fx.plan.plan import Plan, plan
    from spikenm_fx.plan.rules import Rule
    from spikenm_fx.recipe.schema import load_recipe
    from spikenm_fx.report.measure import report
    from spikenm_fx.report.view import Report
    from spikenm_fx.trace.api import trace
    from spikenm_fx.trace.graph import SpikingGraph
    from spikenm_fx.verify import Verification, verify

__all__ = [
    "NM",
    "Diagnosis",
    "Plan",
    "Report",
    "Rule",
    "SpikeNMError",
    "SpikingGraph",
    "Verification",
    "dense_state_dict",
    "doctor",
    "fold",
    "load_recipe",
    "pack",
    "param_groups",
    "plan",
    "report",
    "sparsify",
    "trace",
    "verify",
]

attach(
    __name__,
    {
        "NM": "spikenm_fx.pattern",
        "Diagnosis": "spikenm_fx.doctor",
        "Plan": "spikenm_fx.plan.plan",
        "Report": "spikenm_fx.report.view",
        "Rule": "spikenm_fx.plan.rules",
        "SpikeNMError": "spikenm_fx.errors",
        "SpikingGraph": "spikenm_fx.trace.graph",
        "Verification": "spikenm_fx.verify",
        "dense_state_dict": "spikenm_fx.fold",
        "doctor": "spikenm_fx.doctor",
        "fold": "spikenm_fx.fold",
        "load_recipe": "spikenm_fx.recipe.schema",
        "pack": "spikenm_fx.pack.api",
        "param_groups": "spikenm_fx.masks.sparsify",
        "plan": "spikenm_fx.plan.plan",
        "report": "spikenm_fx.report.measure",
        "sparsify": "spikenm_fx.masks.sparsify",
        "trace": "spikenm_fx.trace.api",
        "verify": "spikenm_fx.verify",
    },
)
