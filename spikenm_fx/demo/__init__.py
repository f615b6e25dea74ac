# SPDX-License-Identifier: Apache-2.0
"""The demo: a spiking network learns digits dense, at 2:4 and at 1:8."""
