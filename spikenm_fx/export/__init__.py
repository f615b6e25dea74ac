# SPDX-License-Identifier: Apache-2.0
"""Where folded models go next."""

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
