# SPDX-License-Identifier: Apache-2.0
"""Learnable N:M sparsity for spiking neural networks."""
