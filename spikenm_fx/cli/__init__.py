# SPDX-License-Identifier: Apache-2.0
"""The command line ``spikenm-fx``."""

from spikenm_fx.cli.app import app, main

__all__ = ["app", "main"]
