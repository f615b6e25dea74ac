# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds of a masked layer, and which checkpoints are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import CheckpointError

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["DENSE", "EID_KEY", "LOGITS", "META", "StoredMask", "check_checkpoint"]

LOGITS = "weight_logits"
DENSE = "weight_dense"
META = "weight_nm"
EID_KEY = "weight_eid"
_META_VERSION = 1


class StoredMask(nn.Module):
    """The half of a masked layer that reads and writes state dicts."""

    _nm_mask: MaskedWeight

    @property
    def weight_nm(self) -> Tensor:
        """What a checkpoint stores: int64 ``[format, keep, of, seed, step, axis, groups]``.

        ``axis`` is that of the input channels, ``groups`` the number of groups it is made of.
        """
        mask = self._nm_mask
        view, clock = mask.view, mask.clock
        step = clock.settle()
        axis, groups = (0, view.groups) if view.transposed else (1, 1)
        return torch.tensor(
            [_META_VERSION, view.nm.keep, view.nm.of, clock.seed, step, axis, groups]
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        meta, final = self.weight_nm, self._nm_mask.final_weight()  # counts steps, holds logits
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + DENSE] = destination[prefix + "weight"]
        destination[prefix + "weight"] = final
        destination[prefix + META] = meta
        if self._nm_mask.guide is not None:
            destination[prefix + EID_KEY] = self._nm_mask.guide.stored(self._nm_mask)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mask = self._nm_mask
        misfit = _misfit(self, state_dict, prefix, strict)
        if misfit:  # only where this layer or a part of the model is loaded by itself
            raise _foreign(type(self).__name__, [misfit])
        mask.release()
        dense = state_dict.pop(prefix + DENSE, None)
        meta = state_dict.pop(prefix + META, None)
        if mask.guide is not None:
            average = state_dict.pop(prefix + EID_KEY, None)
            if average is not None:
                mask.guide.load(average)
            elif strict and meta is not None:
                missing_keys.append(prefix + EID_KEY)
        if dense is not None:
            state_dict[prefix + "weight"] = dense
        own_scores = meta is None and prefix + LOGITS not in state_dict and mask.scores is not None
        if own_scores:  # of a dense model: strictness must not ask for what it cannot have
            state_dict[prefix + LOGITS] = self._parameters[LOGITS]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if own_scores:
            state_dict.pop(prefix + LOGITS)
        if meta is not None:
            mask.clock.set(seed=int(meta[3]), step=int(meta[4]))
        else:
            mask.clock.set(seed=mask.clock.seed, step=mask.clock.settle())
            if mask.clock.step == 0 and prefix + "weight" in state_dict:
                mask.restart()


def check_checkpoint(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: object = None,
    strict: bool = False,
    *_: object,
) -> None:
    """Load hook of the root: refuse a foreign checkpoint before a single tensor is copied.

    Raises:
        CheckpointError: if a layer's pattern or the format version is another one, or if (where
            loaded strictly) only a part of what belongs to a mask is there.
    """
    misfits = (
        _misfit(layer, state_dict, f"{prefix}{name}." if name else prefix, strict)
        for name, layer in model.named_modules()
        if isinstance(layer, StoredMask)
    )
    wrong = [misfit for misfit in misfits if misfit]
    if wrong:
        raise _foreign(type(model).__name__, wrong)


def _misfit(layer: StoredMask, state_dict: dict[str, Any], prefix: str, strict: bool) -> str | None:
    """Why the entries under ``prefix`` cannot be loaded into ``layer``; None where they can."""
    mask = layer._nm_mask
    where = f"{prefix.rstrip('.') or mask.name or 'weight'} {tuple(mask.dense.shape)}"
    keys = [DENSE, META] if mask.scores is None else [DENSE, LOGITS, META]
    missing = [key for key in keys if prefix + key not in state_dict]
    if strict and 0 < len(missing) < len(keys):
        return f"{where}: {', '.join(missing)} missing beside the others: is the file truncated?"
    if META in missing:
        return None
    meta, wanted = state_dict[prefix + META], layer.weight_nm
    if not isinstance(meta, Tensor) or meta.dim() != 1 or not len(meta):
        return f"{where}: {META} is {meta!r}, not a list of integers"
    if meta[0] != wanted[0] or meta.shape != wanted.shape:
        return f"{where}: mask format {meta.tolist()}, this version reads {wanted.tolist()}"
    if not torch.equal(meta[1:3].cpu(), wanted[1:3]):
        return f"{where}: checkpoint {int(meta[1])}:{int(meta[2])}, model {mask.view.nm}"
    scores, own = state_dict.get(prefix + LOGITS), mask.scores
    shapes = [None if s is None else tuple(s.shape) for s in (scores, own)]
    if shapes[0] != shapes[1] and (strict or None not in shapes):
        return f"{where}: checkpoint of another method, its {LOGITS} {shapes[0]}, here {shapes[1]}"
    return None


def _foreign(owner: str, wrong: list[str]) -> CheckpointError:
    shown = "\n  ".join(wrong[:5] + ([f"... {len(wrong) - 5} more"] if len(wrong) > 5 else []))
    return CheckpointError(
        f"the checkpoint does not fit the masks of {owner}:\n  {shown}\n"
        "sparsify a dense model with the checkpoint's pattern before loading it"
    )
