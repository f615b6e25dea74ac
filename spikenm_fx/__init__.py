# SPDX-License-Identifier: Apache-2.0
"""Learnable N:M sparsity for spiking neural networks.

``sparsify`` a model, train it with your own loop, ``fold`` it, ``verify`` it, ``pack`` it.  ``n:m``
always means *keep at most n of m* consecutive input channels.

Each verb is imported when it is first used.  ``spikenm_fx.pack`` is always the verb, as are
``trace``, ``plan``, ``fold``, ``verify``, ``report`` and ``doctor``; what else the module of that
name holds is reached by ``from spikenm_fx.pack import ...``, whatever was imported before.

How a masked layer works: :mod:`spikenm_fx.masks`.  How packing works: :mod:`spikenm_fx.pack`.
"""

from typing import TYPE_CHECKING

from spikenm_fx._lazy import attach

if TYPE_CHECKING:
    from spikenm_fx.channels import permute, remove_channels, remove_dead_channels
    from spikenm_fx.doctor import doctor
    from spikenm_fx.errors import SpikeNMError
    from spikenm_fx.export.adopt import adopt
    from spikenm_fx.fold import dense_state_dict, fold
    from spikenm_fx.masks.hooks import step
    from spikenm_fx.masks.progress import progress
    from spikenm_fx.masks.sparsify import param_groups, sparsify
    from spikenm_fx.native.library import native_status
    from spikenm_fx.pack.api import pack, packing
    from spikenm_fx.pack.weights.files import load_packed, save_packed
    from spikenm_fx.pattern import NM
    from spikenm_fx.plan.plan import Plan, plan
    from spikenm_fx.plan.rules import Rule
    from spikenm_fx.program.engine import load_engine
    from spikenm_fx.recipe.schema import load_recipe
    from spikenm_fx.report.measure import report
    from spikenm_fx.report.view import Report, compare
    from spikenm_fx.trace.api import trace
    from spikenm_fx.trace.graph import SpikingGraph
    from spikenm_fx.verify import Verification, verify

__version__ = "0.1.0.dev0"

__all__ = [
    "NM", "Plan", "Report", "Rule", "SpikeNMError", "SpikingGraph", "Verification", "__version__",
    "adopt", "compare", "dense_state_dict", "doctor", "fold", "load_engine", "load_packed",
    "load_recipe", "native_status", "pack", "packing", "param_groups", "permute", "plan",
    "progress", "remove_channels", "remove_dead_channels", "report", "save_packed", "sparsify",
    "step", "trace", "verify",
]  # fmt: skip

_HOMES = {
    "channels": "permute remove_channels remove_dead_channels",
    "doctor": "doctor",
    "errors": "SpikeNMError",
    "export.adopt": "adopt",
    "fold": "dense_state_dict fold",
    "masks.hooks": "step",
    "masks.progress": "progress",
    "masks.sparsify": "param_groups sparsify",
    "native.library": "native_status",
    "pack.api": "pack packing",
    "pack.weights.files": "load_packed save_packed",
    "pattern": "NM",
    "plan.plan": "Plan plan",
    "plan.rules": "Rule",
    "program.engine": "load_engine",
    "recipe.schema": "load_recipe",
    "report.measure": "report",
    "report.view": "Report compare",
    "trace.api": "trace",
    "trace.graph": "SpikingGraph",
    "verify": "Verification verify",
}
attach(__name__, {n: f"{__name__}.{home}" for home, names in _HOMES.items() for n in names.split()})
