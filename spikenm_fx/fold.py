# SPDX-License-Identifier: Apache-2.0
"""Bake the final masks into the weights and leave no trace of us."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PlanError, no_module
from spikenm_fx.masks.attach import MaskedLayer, detach, masked_layers, masked_weights
from spikenm_fx.masks.checkpoint import check_checkpoint
from spikenm_fx.masks.eid.forward_hooks import remove_hooks
from spikenm_fx.masks.keys import DENSE, EID_KEY, LOGITS, META, MOMENTUM, PRIOR

__all__ = ["dense_state_dict", "fold"]

ModelT = TypeVar("ModelT", bound=nn.Module)


@torch.no_grad()
def fold(model: ModelT) -> ModelT:
    """Write exact N:M zeros into the dense weights, in place, and restore the modules' own classes.

    The outputs in evaluation mode stay bit-identical; ``state_dict()`` has exactly the keys that
    the model had before :func:`spikenm_fx.sparsify`; parameters keep their identity.

    Returns:
        ``model`` itself.

    Raises:
        PlanError: if the model is not sparse.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(no_module("fold", model))
    layers = [layer for _, layer in masked_layers(model)]
    if not layers:
        raise PlanError(
            f"{type(model).__name__} has nothing to fold: no weight is masked; "
            "call spikenm_fx.sparsify(model) first, or it was folded before"
        )
    # All masks first, as that may fail; a mask takes a quarter of the memory of its weight.
    weights = {id(mask): mask for _, _, mask in masked_weights(model)}
    for mask in weights.values():
        mask.warn_of_fade("folded")
    masks = {key: mask.final() for key, mask in weights.items()}
    for key, mask in weights.items():
        mask.bake(masks.pop(key))
    for layer in layers:
        detach(layer)
    remove_hooks(model)
    for module in nn.Module.modules(model):
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
    return model


def _is_ours(hook: object) -> bool:
    return getattr(hook, "hook", None) is check_checkpoint


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The masked weights under the dense model's keys: loads strictly into a plain dense model.

    Args:
        model: a sparsified model, at any point of its training; it is not changed.
    """
    ours = {
        f"{name}.{key}{ending}".lstrip(".")
        for name, layer in nn.Module.named_modules(model, remove_duplicate=False)
        if isinstance(layer, MaskedLayer)
        for key in layer._nm_masks
        for ending in (LOGITS, DENSE, META, EID_KEY, MOMENTUM, PRIOR)
    }
    return {key: value for key, value in model.state_dict().items() if key not in ours}
