# SPDX-License-Identifier: Apache-2.0
"""As it was before: snapshots of modules and tensors, and what holds them while others look."""
