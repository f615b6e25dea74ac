# SPDX-License-Identifier: Apache-2.0
"""Run a model once and record what it computes: the value-carrying tracer and the recorder."""
