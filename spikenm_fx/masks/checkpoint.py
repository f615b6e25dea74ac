# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds of a masked layer, and which checkpoints are refused."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spikenm_fx.errors import CheckpointError
from spikenm_fx.masks.keys import DENSE, EID_KEY, LOGITS, META, MOMENTUM, PRIOR
from spikenm_fx.masks.shard import blocked, is_sharded, laid_out, part_of, whole_of
from spikenm_fx.masks.start import loaded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from spikenm_fx.masks.layer import MaskedWeight

__all__ = [
    "StoredMask",
    "check_checkpoint",
    "meta_of",
    "stored_credits",
    "stored_momentum",
]

_META_VERSION = 3
_META_LENGTHS = {1: 7, 2: 8, 3: 9}
"""Numbers by version; 1: without the prior's strength and the run's length, 2: nor the method."""


class StoredMask(nn.Module):
    """The half of a masked layer that reads and writes state dicts."""

    _nm_masks: dict[str, MaskedWeight]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, mask in self._nm_masks.items():
            name = prefix + key
            if name not in destination:
                continue  # taken out, or parametrized
            destination[name + DENSE] = destination[name]
            destination[name] = _like_weight(mask, mask.final_weight())
            destination[name + META] = meta_of(mask)
            scores = destination.get(name + LOGITS)
            if scores is not None and not keep_vars and not is_sharded(scores):
                destination[name + LOGITS] = laid_out(mask.whole, scores)
            if mask.learns:
                destination[name + MOMENTUM] = stored_momentum(mask)
            if mask.guide is not None:
                destination[name + EID_KEY] = stored_credits(mask)

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
        # again, as this module may be the root, or be loaded by itself
        _refuse_foreign(self, state_dict, prefix, strict)
        metas = {
            key: _unpack(mask, state_dict, prefix + key, strict, missing_keys)
            for key, mask in self._nm_masks.items()
        }
        lent = []
        for key, mask in self._nm_masks.items():
            _lay_out(mask, state_dict, prefix + key)
            # of a dense model, or one of an older format: strictness must not ask for what it
            # cannot have
            for ending, own in ((LOGITS, mask.scores), (PRIOR, mask.prior)):
                name = prefix + key + ending
                absent = own is not None and name not in state_dict
                if absent and (metas[key] is None or ending == PRIOR):
                    state_dict[name] = own
                    lent.append(name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in lent:
            state_dict.pop(name)
        for key, mask in self._nm_masks.items():
            meta = metas[key]
            if meta is not None:
                _warn_of_another_length(mask, meta)
                mask.run.set(seed=int(meta[3]), step=int(meta[4]))
                loaded(mask, knows_prior=prefix + key + PRIOR not in lent)
            elif prefix + key in state_dict:
                mask.run.forget_step()
                loaded(mask, restart_scores=mask.run.step == 0)


def stored_momentum(mask: MaskedWeight) -> Tensor:
    """The momentum of the scores as a checkpoint holds it, laid out as they are."""
    assert mask.scores is not None
    momentum = mask.momentum
    if momentum is None:
        momentum = torch.zeros_like(mask.scores, dtype=torch.float32, requires_grad=False)
    if mask.shard is not None:
        return mask.shard.like_scores(momentum)
    return laid_out(mask.whole, momentum)


def stored_credits(mask: MaskedWeight) -> Tensor:
    """The running credits of the distillation as a checkpoint holds them, of the weight's shape."""
    assert mask.guide is not None
    return _like_weight(mask, mask.guide.stored(mask))


def _like_weight(mask: MaskedWeight, part: Tensor) -> Tensor:
    return part if mask.shard is None else mask.shard.like_weight(part)


def meta_of(mask: MaskedWeight) -> Tensor:
    """What a checkpoint stores: int64 ``[format, keep, of, seed, step, axis, groups, total, by]``.

    ``axis`` is that of the input channels, ``groups`` the number of groups it is made of, ``total``
    the optimizer steps of the whole run, 0 where they are not known, ``by`` stands for the method.
    """
    view, run = mask.whole, mask.run
    axis, groups = (0, view.groups) if view.transposed else (1, 1)
    numbers = [_META_VERSION, view.nm.keep, view.nm.of, run.seed, run.shown_step, axis, groups]
    numbers += [mask.schedule.total_steps or 0, _number_of(mask.method.name)]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _number_of(method: str) -> int:
    return int.from_bytes(hashlib.blake2b(method.encode(), digest_size=4).digest())


def _warn_of_another_length(mask: MaskedWeight, meta: Tensor) -> None:
    stored = int(meta[7]) if len(meta) > 7 else None
    own = mask.schedule.total_steps or 0
    if stored is not None and stored != own:
        words = [f"total_steps={n or None}" for n in (stored, own)]
        mask.run.warn(
            "length",
            f"the checkpoint is of a run with {words[0]}, this model has {words[1]}: "
            "temperatures, fade and freeze go on by the model's. To continue the same run, "
            f"sparsify with {words[0]}",
        )


def _unpack(
    mask: MaskedWeight, state_dict: Any, name: str, strict: bool, missing: list[str]
) -> Tensor | None:
    """Take what is the mask's out of ``state_dict``, which then holds the dense weight."""
    dense: Tensor | None = state_dict.pop(name + DENSE, None)
    meta: Tensor | None = state_dict.pop(name + META, None)
    momentum: Tensor | None = state_dict.pop(name + MOMENTUM, None)
    if mask.learns and meta is not None:
        usable = momentum is not None and bool(whole_of(momentum.any()))
        mask.momentum = None
        if usable and momentum is not None:
            mask.momentum_now().copy_(_scores_of(mask, momentum))
    if mask.guide is not None:
        average = state_dict.pop(name + EID_KEY, None)
        if average is not None:
            known = bool(whole_of(average.any()))
            mask.guide.load(_weight_of(mask, average) if known else None)
        elif strict and meta is not None:
            missing.append(name + EID_KEY)
    if dense is not None:
        state_dict[name] = dense
    return meta


def _lay_out(mask: MaskedWeight, state_dict: Any, name: str) -> None:
    """Bring dense weight and scores of ``state_dict`` into the layout that the parameters have."""
    for key, find in ((name, _weight_of), (name + LOGITS, _scores_of)):
        value, shard = state_dict.get(key), mask.shard
        if not isinstance(value, Tensor) or (key == name and is_sharded(value) == bool(shard)):
            continue
        part = find(mask, value)
        if shard is not None:
            part = shard.like_weight(part) if key == name else shard.like_scores(part)
        state_dict[key] = part


def _weight_of(mask: MaskedWeight, stored: Tensor) -> Tensor:
    """What this rank holds of a tensor of the weight's shape, whole or a DTensor."""
    if mask.shard is None:
        return whole_of(stored)
    if is_sharded(stored) and mask.shard.fits(cast("DTensor", stored)):
        return part_of(stored)
    return mask.shard.part(whole_of(stored))


def _scores_of(mask: MaskedWeight, stored: Tensor) -> Tensor:
    """The same of scores, as blocks; those of older checkpoints are blocks."""
    shard = mask.shard
    if shard is not None and is_sharded(stored) and shard.fits_scores(cast("DTensor", stored)):
        return blocked(mask.view, part_of(stored))
    whole = whole_of(stored)
    whole = whole if whole.dim() == 3 else blocked(mask.whole, whole)
    return whole if mask.shard is None else mask.shard.part_of_scores(whole)


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
    if not isinstance(model, StoredMask):  # which has asked before it took its own entries out
        _refuse_foreign(model, state_dict, prefix, strict)


def _refuse_foreign(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, strict: bool
) -> None:
    wrong = [
        misfit
        for name, layer in nn.Module.named_modules(model)
        if isinstance(layer, StoredMask)
        for misfit in _misfits(layer, state_dict, f"{prefix}{name}." if name else prefix, strict)
    ]
    if wrong:
        raise _foreign(type(model).__name__, wrong)


def _misfits(layer: StoredMask, state_dict: dict[str, Any], prefix: str, strict: bool) -> list[str]:
    """Why the entries under ``prefix`` cannot be loaded into ``layer``; none where they can."""
    found = (
        _misfit(mask, state_dict, prefix + key, strict) for key, mask in layer._nm_masks.items()
    )
    return [misfit for misfit in found if misfit]


def _misfit(mask: MaskedWeight, state_dict: dict[str, Any], name: str, strict: bool) -> str | None:
    full = name if "." in name else mask.name or name  # of a layer that is loaded by itself
    where = f"{full.removesuffix('.weight')} {mask.whole.shape}"
    endings = [DENSE, META] if mask.scores is None else [DENSE, LOGITS, META]
    missing = [ending for ending in endings if name + ending not in state_dict]
    if strict and 0 < len(missing) < len(endings):
        keys = ", ".join(name.rpartition(".")[2] + ending for ending in missing)
        return f"{where}: {keys} missing beside the others: is the file truncated?"
    if META in missing:
        return None
    meta, wanted = state_dict[name + META], meta_of(mask)
    if not isinstance(meta, Tensor) or meta.dim() != 1 or not len(meta):
        return f"{where}: {name + META} is {meta!r}, not a list of integers"
    if len(meta) != _META_LENGTHS.get(int(meta[0])):
        return f"{where}: mask format {meta.tolist()}, this version reads {wanted.tolist()}"
    if not torch.equal(meta[1:3].cpu(), wanted[1:3]):
        return f"{where}: checkpoint {int(meta[1])}:{int(meta[2])}, model {mask.view.nm}"
    if not torch.equal(meta[5:7].cpu(), wanted[5:7]):
        axes = " and ".join(f"axis {int(m[5])} in {int(m[6])} groups" for m in (meta, wanted))
        return f"{where}: the checkpoint's blocks and the model's lie along {axes}"
    if len(meta) > 8 and int(meta[8]) != int(wanted[8]):
        return f"{where}: checkpoint of another method than {mask.method.name!r}"
    shapes = [_shape(mask, state_dict.get(name + LOGITS)), _own_shape(mask)]
    if shapes[0] != shapes[1] and (strict or None not in shapes):
        return f"{where}: checkpoint of another method, its logits {shapes[0]}, here {shapes[1]}"
    return None


def _own_shape(mask: MaskedWeight) -> tuple[int, ...] | None:
    """Of the whole weight's scores as blocks."""
    lead, _, inner = mask.whole.blocked_shape
    return None if mask.scores is None else (lead, mask.scores.shape[1], inner)


def _shape(mask: MaskedWeight, scores: Tensor | None) -> tuple[int, ...] | None:
    """Of scores in a checkpoint, as blocks where they can be."""
    if scores is None or scores.dim() != 4:
        return None if scores is None else tuple(scores.shape)
    a, b, c, d = scores.shape
    return (a, b, c * d) if mask.whole.transposed else (a * b, c, d)


def _foreign(owner: str, wrong: list[str]) -> CheckpointError:
    shown = "\n  ".join(wrong[:5] + ([f"... {len(wrong) - 5} more"] if len(wrong) > 5 else []))
    return CheckpointError(
        f"the checkpoint does not fit the masks of {owner}:\n  {shown}\n"
        "sparsify a dense model with the checkpoint's pattern before loading it"
    )
