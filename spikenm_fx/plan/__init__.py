# SPDX-License-Identifier: Apache-2.0
"""Decide which layers become N:M, purely: nothing here touches the model."""

from spikenm_fx.plan.plan import LayerPlan, Plan, plan
from spikenm_fx.plan.rules import Rule

__all__ = ["LayerPlan", "Plan", "Rule", "plan"]
