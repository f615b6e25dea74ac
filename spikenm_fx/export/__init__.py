# SPDX-License-Identifier: Apache-2.0
"""Where folded models go next.

| model | file | spikingjelly | snntorch | norse | sinabs | onnx |
|---|---|---|---|---|---|---|
| SpikingJelly MLP, all steps | equal | equal | equal | equal | several spikes | equal |
| SpikingJelly MLP, one step | equal | equal | equal | equal | several spikes | equal |
| SpikingJelly conv, norm, pool | equal | equal | equal | equal | several spikes | equal |
| SpikingJelly residual | equal | equal | equal | equal | several spikes | equal |
| SpikingJelly branches | equal | equal | equal | branches | several spikes | equal |
| SpikingJelly soft reset | soft reset | soft reset | soft reset | soft reset | several spikes | equal |
| SpikingJelly max pool | maximum | maximum | maximum | maximum | maximum | equal |
| SpikingJelly depthwise | equal | depthwise | depthwise | depthwise | several spikes | equal |
| hand-written feedback | equal | equal | recurrent | equal | several spikes | equal |
| snnTorch loop, reset to zero | equal | equal | equal | equal | several spikes | equal |
| snnTorch loop, as it comes | reset delay | reset delay | reset delay | reset delay | several spikes | equal |
| snnTorch conv, one step | equal | equal | equal | equal | several spikes | equal |
| snnTorch conv, 2 groups | equal | 2 groups | equal | equal | several spikes | equal |
| snnTorch recurrent | equal | equal | recurrent | equal | several spikes | equal |
| Norse loop | equal | equal | equal | equal | several spikes | equal |
| Norse conv, one step | equal | equal | equal | equal | several spikes | equal |
| Norse with synapse | synapse | synapse | synapse | synapse | several spikes | equal |
| sinabs, several spikes | one spike | one spike | one spike | one spike | equal | equal |
| sinabs conv | one spike | one spike | one spike | one spike | equal | equal |
| sinabs, single spikes | equal | equal | equal | equal | several spikes | equal |
| hand-written, rule told | equal | equal | equal | equal | several spikes | equal |
| hand-written | update rule | update rule | update rule | update rule | update rule | equal |
"""

from typing import TYPE_CHECKING

from spikenm_fx._lazy import attach

if TYPE_CHECKING:
    from spikenm_fx.export.adopt import PackedBits, adopt
    from spikenm_fx.export.nir_export import nir
    from spikenm_fx.export.nir_verify import NIRAgreement, verify_nir
    from spikenm_fx.export.onnx_export import onnx
    from spikenm_fx.export.onnx_run import run_onnx
    from spikenm_fx.export.onnx_verify import verify_onnx
    from spikenm_fx.export.semi_structured import SemiReport, semi_report, semi_structured

__all__ = [
    "NIRAgreement",
    "PackedBits",
    "SemiReport",
    "adopt",
    "nir",
    "onnx",
    "run_onnx",
    "semi_report",
    "semi_structured",
    "verify_nir",
    "verify_onnx",
]

_HOMES = {
    "adopt": "PackedBits adopt",
    "nir_export": "nir",
    "nir_verify": "NIRAgreement verify_nir",
    "onnx_export": "onnx",
    "onnx_run": "run_onnx",
    "onnx_verify": "verify_onnx",
    "semi_structured": "SemiReport semi_report semi_structured",
}
attach(__name__, {n: f"{__name__}.{home}" for home, names in _HOMES.items() for n in names.split()})
