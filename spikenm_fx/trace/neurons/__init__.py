# SPDX-License-Identifier: Apache-2.0
"""Which modules are neurons, and the update rule of each."""
