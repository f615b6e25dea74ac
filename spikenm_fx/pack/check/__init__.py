# SPDX-License-Identifier: Apache-2.0
"""Does the engine compute what the folded model computes?"""
