# SPDX-License-Identifier: Apache-2.0
"""The packed format of N:M weights, in memory and on disk."""
