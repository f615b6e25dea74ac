# SPDX-License-Identifier: Apache-2.0
"""The inference copy: packed layers, fused neurons and spikes that stay bits."""
