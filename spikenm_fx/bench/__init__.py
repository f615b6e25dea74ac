# SPDX-License-Identifier: Apache-2.0
"""Measurements: every figure in the README comes from a command in here."""
