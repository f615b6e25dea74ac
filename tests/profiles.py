# SPDX-License-Identifier: Apache-2.0
"""How many examples a property is tried with: all, or the share that the profile in use takes.

``--hypothesis-profile thorough`` takes all of them, as before a release; without it a gate takes
what finds a fault over some runs, and ``quick`` what one waits for while working.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["USUAL", "tries"]

FULL = 25
"""Examples of a property that names no number of its own."""
PROFILES = {"thorough": FULL, "gate": 6, "quick": 2}
"""The same by profile; properties that name a number take the same share of it."""
USUAL = "gate"

for _name, _most in PROFILES.items():
    settings.register_profile(
        _name,
        deadline=None,
        max_examples=_most,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def tries(full: int, **options: Any) -> settings:
    """Settings of a property that is worth ``full`` examples, for the profile in use."""
    share = settings.default.max_examples / FULL
    return settings(max_examples=max(1, round(full * share)), deadline=None, **options)
