# SPDX-License-Identifier: Apache-2.0
"""Endings of the keys under which parameters and checkpoints hold what belongs to a mask."""

__all__ = ["DENSE", "EID_KEY", "LOGITS", "META", "MOMENTUM", "PRIOR"]

LOGITS, DENSE, META, EID_KEY = "_logits", "_dense", "_nm", "_eid"
PRIOR, MOMENTUM = "_prior", "_momentum"
"""What is stored beside a weight, under its key with these endings."""
