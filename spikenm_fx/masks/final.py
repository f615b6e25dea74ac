# SPDX-License-Identifier: Apache-2.0
"""The final mask of evaluation, kept for as long as weight and scores are the same.

A change is noticed by what torch counts (which tensor, where its memory is, how often it was
written to), without a look at the values, so that no device is waited for.  Writes through
``.data`` are not counted: on the CPU a checksum of the memory sees them; on other devices they show
after the next ``model.eval()`` or ``model.train()``, which compute the masks anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from spikenm_fx.masks.checksum import checksum
from spikenm_fx.masks.shard import part_of
from spikenm_fx.masks.update import final_masks

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["FinalMask"]


class FinalMask:
    """A mask, and what the tensors looked like that it was made from."""

    def __init__(self) -> None:
        self._made_of: list[Any] | None = None
        self._held: list[Tensor] = []  # so that no id is given to another tensor
        self._mask: Tensor | None = None

    def of(self, weight: MaskedWeight) -> Tensor:
        """The final mask of ``weight``; made for all weights of the model where one has changed."""
        if weight.method.fixed and not weight.lent:
            return weight.mask
        if self.fits(weight):
            assert self._mask is not None
            return self._mask
        if weight.lent:
            return weight.final()
        stale = [w for w in weight.run if w.there and not w.lent and not w._final.fits(w)]
        for each, mask in final_masks(stale).items():
            each._final.take(each, mask)
        assert self._mask is not None
        return self._mask

    def fits(self, weight: MaskedWeight) -> bool:
        """Whether the mask is still that of the tensors of ``weight``."""
        return self._made_of is not None and self._made_of == _look(_tensors(weight))

    def take(self, weight: MaskedWeight, mask: Tensor) -> None:
        """Keep ``mask``, just made, bool of the shape of the weight."""
        self._held = _tensors(weight)
        self._made_of, self._mask = _look(self._held), mask

    def forget(self) -> None:
        """Let go of it."""
        self._made_of, self._mask, self._held = None, None, []


def _tensors(weight: MaskedWeight) -> list[Tensor]:
    found = [part_of(weight.dense), weight.scores, weight.prior]
    return [tensor for tensor in found if tensor is not None]


def _look(tensors: list[Tensor]) -> list[Any]:
    return [
        (
            *(id(t), t.data_ptr(), t.dtype, t.device),
            0 if t.is_inference() else t._version,
            checksum(t),
        )
        for t in tensors
    ]
