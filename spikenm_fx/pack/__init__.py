# SPDX-License-Identifier: Apache-2.0
"""Deploy: packed N:M weights, and the kernels and the engine that run them."""

from spikenm_fx.native.library import NativeStatus, native_status
from spikenm_fx.pack.engine import pack, packing
from spikenm_fx.pack.files import is_packed, load_packed, save_packed
from spikenm_fx.pack.format import LayerGeometry, PackedWeight, pack_weight, unpack_weight
from spikenm_fx.pack.layer import PackedLayer
from spikenm_fx.pack.report import LayerReport, PackReport

__all__ = [
    "LayerGeometry",
    "LayerReport",
    "NativeStatus",
    "PackReport",
    "PackedLayer",
    "PackedWeight",
    "is_packed",
    "load_packed",
    "native_status",
    "pack",
    "pack_weight",
    "packing",
    "save_packed",
    "unpack_weight",
]
