# SPDX-License-Identifier: Apache-2.0
"""Deploy: packed N:M weights, and the kernels and the engine that run them."""

from spikenm_fx.pack.files import load_packed, save_packed
from spikenm_fx.pack.format import LayerGeometry, PackedWeight, pack_weight, unpack_weight

__all__ = [
    "LayerGeometry",
    "PackedWeight",
    "load_packed",
    "pack_weight",
    "save_packed",
    "unpack_weight",
]
