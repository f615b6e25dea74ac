# SPDX-License-Identifier: Apache-2.0
"""``doctor``: placeholder until the trace is there."""

from typing import Any


def diagnose(loaded: object) -> Any:
    """Not yet."""
    raise NotImplementedError
