# SPDX-License-Identifier: Apache-2.0
"""How many threads the compiled kernels may use here."""

from __future__ import annotations

import os

import torch

__all__ = ["kernel_threads"]

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def kernel_threads() -> int:
    """Torch's number of threads; one in a forked process.

    A pool that was in use before the fork has no threads there, and would be waited for in vain.
    """
    return 1 if _forked else torch.get_num_threads()
