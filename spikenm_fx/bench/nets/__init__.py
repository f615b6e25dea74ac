# SPDX-License-Identifier: Apache-2.0
"""Small spiking networks, one file per framework; a file imports its framework."""
