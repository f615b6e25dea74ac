# SPDX-License-Identifier: Apache-2.0
"""What spikenm_fx raises: every message says what was seen, what is required, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CheckpointError",
    "ExportError",
    "PackError",
    "PackedFileError",
    "PatternError",
    "PlanError",
    "RecipeError",
    "ReportError",
    "SpikeNMError",
    "SpikeNMWarning",
    "TorchVersionError",
    "TraceError",
    "VerificationError",
    "did_you_mean",
    "near_misses",
    "no_module",
    "some_of",
]


class SpikeNMError(Exception):
    """Base of every error that spikenm_fx raises on purpose.

    Raising one leaves the user's model and files as they were.
    """


class TorchVersionError(SpikeNMError, RuntimeError):
    """This version of torch lacks something that was asked of it; the rest still works."""


class PatternError(SpikeNMError, ValueError):
    """A pattern that is not ``keep:of`` with ``1 <= keep <= of``, or does not fit a weight."""


class PlanError(SpikeNMError, ValueError):
    """A plan that cannot be made or applied: no layer matched, a rule in vain, sparse twice."""


class TraceError(SpikeNMError, RuntimeError):
    """A model that cannot be read: its forward raises on the examples, or hides its layers."""


class CheckpointError(SpikeNMError, RuntimeError):
    """A checkpoint that does not belong to this sparse model, for instance of another pattern."""


class PackError(SpikeNMError, ValueError):
    """A weight, model or input that cannot be packed or run packed: not N:M, NaN, wrong device."""


class PackedFileError(SpikeNMError, RuntimeError):
    """A packed file that is damaged, edited by hand, or of another format version."""


class ExportError(SpikeNMError, ValueError):
    """A model that cannot be exported so that it stays the same network, or a missing package."""


class RecipeError(SpikeNMError, ValueError):
    """A recipe file, or an entry point it names, that cannot be used; lists every mistake."""


class ReportError(SpikeNMError, RuntimeError):
    """A report that cannot be made, e.g. because no batch was given or the model cannot run it."""


class VerificationError(SpikeNMError, AssertionError):
    """Weights that are not N:M where they must be."""


class SpikeNMWarning(UserWarning):
    """Something works, but surely not as intended (e.g. logits that no optimizer updates)."""


def no_module(call: str, found: object) -> str:
    """What is said where a model is required and something else was given.

    Args:
        call: the function's name.
        found: what was given instead of a module.
    """
    what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
    return f"{call}() needs an nn.Module, the model itself, got {what}"


def near_misses(word: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> str:
    """What ``word`` was probably meant to be, comma-separated; "" where nothing is near.

    Args:
        word: what was seen.
        known: what would have been right.
        count: names at most.
        cutoff: how alike they must be, from 0 to 1 (see :func:`difflib.get_close_matches`).
    """
    return ", ".join(get_close_matches(word, list(known), n=count, cutoff=cutoff))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` for the end of a message; "" where nothing is near."""
    near = near_misses(word, known)
    return f"; did you mean {near!r}?" if near else ""


def some_of(names: Iterable[str], most: int = 5) -> str:
    """The first names, comma-separated, and dots where there are more."""
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
