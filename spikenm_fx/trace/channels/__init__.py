# SPDX-License-Identifier: Apache-2.0
"""Which channels are coupled: index spaces propagated through the graph."""
