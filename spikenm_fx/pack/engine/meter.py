# SPDX-License-Identifier: Apache-2.0
"""How long a layer takes, measured where it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch

__all__ = ["Meter", "metered"]

Owner = TypeVar("Owner")
P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(slots=True)
class Meter:
    """Time spent in one layer.

    Attributes:
        seconds: of all calls; of this thread's processor time where one thread computes.
        running: inside a call, whose inner calls count once.
    """

    seconds: float = 0.0
    running: bool = False

    def measure(self, call: Callable[[], Result]) -> Result:
        """Run ``call`` and add its time."""
        if self.running:
            return call()
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self.running = True
        start = clock()
        try:
            return call()
        finally:
            self.seconds += clock() - start
            self.running = False


def metered(
    method: Callable[Concatenate[Owner, P], Result],
) -> Callable[Concatenate[Owner, P], Result]:
    """A method whose time counts for ``self.meter``, if there is one."""

    def wrapper(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        meter: Meter | None = getattr(self, "meter", None)
        if meter is None:
            return method(self, *args, **kwargs)
        return meter.measure(lambda: method(self, *args, **kwargs))

    wrapper.__doc__ = method.__doc__
    return wrapper
