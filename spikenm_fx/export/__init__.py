# SPDX-License-Identifier: Apache-2.0
"""Where folded models go next."""

from spikenm_fx._lazy import attach

attach(__name__, {"nir": f"{__name__}.nir_export", "verify_nir": f"{__name__}.nir_verify"})
