# SPDX-License-Identifier: Apache-2.0
"""From recorded operations to layers, neurons, chains and signal kinds."""
