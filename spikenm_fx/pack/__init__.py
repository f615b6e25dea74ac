# SPDX-License-Identifier: Apache-2.0
"""Deploy: packed N:M weights, and the kernels and the engine that run them."""

from spikenm_fx.native.library import NativeStatus, native_status
from spikenm_fx.pack.api import pack, packing
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.summary import PackedLayerReport, PackReport
from spikenm_fx.pack.weights.files import is_packed, load_packed, save_packed
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight, unpack_weight
from spikenm_fx.pack.weights.models import save_packed_model, tightest_plan, unpacked_state

__all__ = [
    "LayerGeometry",
    "NativeStatus",
    "PackReport",
    "PackedLayer",
    "PackedLayerReport",
    "PackedWeight",
    "is_packed",
    "load_packed",
    "native_status",
    "pack",
    "pack_weight",
    "packing",
    "save_packed",
    "save_packed_model",
    "tightest_plan",
    "unpack_weight",
    "unpacked_state",
]
