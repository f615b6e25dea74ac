# SPDX-License-Identifier: Apache-2.0
"""Numbers by which ranks tell, in collectives that they need anyway, whether they are one model.

Before the first step ranks compare what ``sparsify`` was told (:mod:`spikenm_fx.masks.ranks`).  A
rank that loads another checkpoint later would train under other masks without a word: steps, seeds
and masks go along with every refresh of the credits, and a difference is one error on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx.errors import PlanError

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight
    from spikenm_fx.masks.run import Run

__all__ = ["compare", "fingerprint", "number_of", "summed", "told_apart"]

_FIELDS = ("step", "seed", "masks")
_BITS = 20  # squares of so many bits, summed over up to 2**13 ranks, are exact in float64


def number_of(value: object) -> int:
    """62 bits that stand for a value's ``repr``; their negative is a number of 64 bits as well."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest()) >> 2


def fingerprint(run: Run, weights: Iterable[MaskedWeight]) -> Tensor:
    """Step, seed and masks as numbers of 20 bits: int64 ``[3]``.

    Args:
        run: of the model.
        weights: whose masks count; of sharded ones every rank has others.
    """
    weights = list(weights)
    device = weights[0].mask.device
    numbers = [number_of(run.step), number_of(run.seed), 0]
    own = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device)
    for place, weight in enumerate(weights):
        if weight.shard is None:
            own[2] += (2 * place + 1) * _of_mask(weight.mask).to(device)
    return (own ^ own >> _BITS ^ own >> 2 * _BITS) & (1 << _BITS) - 1


def summed(own: Tensor) -> Tensor:
    """What ranks add up of a :func:`fingerprint`: shape ``(6,)``, its numbers and their squares."""
    return torch.cat((own.double(), own.double().square()))


def told_apart(total: Tensor, ranks: int) -> Tensor:
    """By the sum of :func:`summed` (shape ``(6,)``) over some ranks: what is the same on all."""
    numbers, squares = total.double().chunk(2)
    return numbers.square() == ranks * squares


def compare(run: Run, same: Tensor) -> None:
    """Let ranks that are one model go on; a device is not waited for before the next comparison.

    Args:
        run: of the model.
        same: bool of the shape ``(3,)``, whether each field is the same on all ranks.

    Raises:
        PlanError: on every rank, if they differ.
    """
    waiting, run.compared = run.compared, None if same.device.type == "cpu" else same
    for found in (waiting, same if run.compared is None else None):
        if found is not None and not bool(found.all()):
            differ = [f for f, equal in zip(_FIELDS, found.tolist(), strict=True) if not equal]
            run.ranks_met, run.compared = False, None
            raise PlanError(
                f"the ranks of this model, which were equal, differ in their "
                f"{' and '.join(differ)}, here step={run.step}, seed={run.seed}: load a checkpoint "
                "on every rank, or on none, and change masked weights on all of them alike"
            )
    run.keep_rhythm(0)


def _of_mask(mask: Tensor) -> Tensor:
    """A number of a mask of any shape that differs, but for chance, where one bit does."""
    flat = mask.flatten()
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    places = torch.arange(1, 2 * len(words), 2, device=mask.device)
    return (words * places).sum()  # modulo 2**64
