# SPDX-License-Identifier: Apache-2.0
"""Report: where a model's zeros are, what fires, and what one inference costs."""

from spikenm_fx.report.data import LatencyReport, LayerReport, NeuronReport, ReportData
from spikenm_fx.report.energy import PJ_PER_AC, PJ_PER_MAC, EnergyModel
from spikenm_fx.report.measure import report
from spikenm_fx.report.synops import Operations, fan_out, signal_kind
from spikenm_fx.report.view import Comparison, Report, compare

__all__ = [
    "PJ_PER_AC",
    "PJ_PER_MAC",
    "Comparison",
    "EnergyModel",
    "LatencyReport",
    "LayerReport",
    "NeuronReport",
    "Operations",
    "Report",
    "ReportData",
    "compare",
    "fan_out",
    "report",
    "signal_kind",
]
