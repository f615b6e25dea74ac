# SPDX-License-Identifier: Apache-2.0
"""The compiled library: its sources, how it is built and found, and its C structures.

Mask sampling and packed inference both use it; without a compiler everything has a torch path.
"""
