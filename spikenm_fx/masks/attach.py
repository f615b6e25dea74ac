# SPDX-License-Identifier: Apache-2.0
"""A module whose weights are masked at every access, in the user's own class and under its keys.

The dense Parameter stays where it was (``_parameters["weight"]``): optimizers, weight-decay rules
and parameter names do not change.  The module's class becomes a subclass of its own class in which
the property ``weight`` returns the masked tensor (see :mod:`spikenm_fx.surgery`); state dicts know
the difference by that subclass, so no hook is ever installed.  A raw parameter, as in
``F.linear(x, self.w)``, is masked in the same way, by a property of its own name.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx import surgery
from spikenm_fx._torch import CHECKPOINTS, FSDP1, SHARDING
from spikenm_fx.errors import PlanError
from spikenm_fx.masks.checkpoint import StoredMask, meta_of, stored_credits, stored_momentum
from spikenm_fx.masks.computed import ComputedWeight
from spikenm_fx.masks.keys import DENSE, EID_KEY, LOGITS, META, MOMENTUM, PRIOR
from spikenm_fx.masks.layer import MaskedWeight
from spikenm_fx.masks.shard import is_sharded, refuse_whole
from spikenm_fx.masks.start import loaded
from spikenm_fx.masks.update import draw_masks
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.state import read_parameter

__all__ = [
    "MaskedLayer",
    "attach",
    "detach",
    "masked_layers",
    "masked_weights",
    "refuse_unmaskable",
]

_COPIERS = ("spikingjelly.activation_based.distributed.tensor_parallel",)
"""Modules that build a layer of a part of another's weight."""

_ROCKPOOL_LIST = "_get_attribute_family"
"""By which rockpool's ``parameters()`` reads attributes: an optimizer needs the dense ones."""


class _FalseOfClass(property):
    """A property that counts as False on its class, where dynamo looks whether FSDP is at work."""

    def __bool__(self) -> bool:
        return False


class MaskedLayer(StoredMask):
    """Mixin in front of the user's class; put there by :func:`attach`, undone by ``fold``.

    Its subclass for a class has three properties for each weight: ``weight``, masked (N:M at every
    access but in the fade of a training schedule) and differentiable to the dense one;
    ``weight_dense``, the parameter behind it; and ``weight_nm``, what a checkpoint stores of the
    mask.
    """

    @staticmethod
    def _class_namespace(plain: Any, *keys: str) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        if hasattr(plain, _ROCKPOOL_LIST):
            properties[_ROCKPOOL_LIST] = _listing_dense(getattr(plain, _ROCKPOOL_LIST))
        for key in keys:
            properties |= _properties(key, copies=plain.__module__.startswith(_COPIERS))
        return properties

    @property
    def _nm_mask(self) -> MaskedWeight:
        """The mask of the layer's weight; of a module with raw parameters, the first."""
        return next(iter(self._nm_masks.values()))

    def train(self, mode: bool = True) -> Any:
        """As of any module; final masks are computed anew when they are asked for next."""
        for mask in self._nm_masks.values():
            mask.forget_final()
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Initialise the parameters themselves, as the module's own class does."""
        masks = self._nm_masks.values()
        for mask in masks:
            mask.raw = True
        try:
            super().reset_parameters()  # type: ignore[misc]
        finally:
            for mask in masks:
                mask.raw = False
        for mask in masks:
            loaded(mask, restart_scores=mask.run.step == 0)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; to what shards parameters over ranks scores and priors do not show.

        They are cut as their weight is, along blocks, once it is a DTensor.

        Raises:
            PlanError: to what shards them, before it does, if the method needs whole weights.
        """
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        if not _caller(1).startswith(SHARDING):
            return found
        for mask in self._nm_masks.values():
            refuse_whole(mask)
        own = {k + ending for k in self._nm_masks for ending in (LOGITS, PRIOR)}
        return ((name, each) for name, each in found if name.rpartition(".")[2] not in own)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As of any module; torch's functions for checkpoints see what a mask adds to state dicts.

        They rename and spread over ranks what they know of, and would leave the rest as it is.
        """
        found = super().named_buffers(prefix, recurse, remove_duplicate)
        if recurse or not _caller(1).startswith(CHECKPOINTS):
            return found
        return itertools.chain(found, self._stored_beside())

    def _stored_beside(self) -> Iterator[tuple[str, Tensor]]:
        for key, mask in self._nm_masks.items():
            if not mask.there:
                continue
            yield key + DENSE, mask.dense.detach()
            yield key + META, meta_of(mask).to(mask.mask.device)
            if mask.learns:
                yield key + MOMENTUM, stored_momentum(mask)
            if mask.guide is not None:
                yield key + EID_KEY, stored_credits(mask)

    def _replicate_for_data_parallel(self) -> Any:
        raise PlanError(
            f"{self._nm_mask.name} {self._nm_mask.whole.shape} is masked, and DataParallel makes "
            "replicas of its layer that know nothing of masks: use one process per device, with "
            "torch.nn.parallel.DistributedDataParallel or torch.distributed.fsdp.fully_shard"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: mask.dense.dtype for name, mask in self._nm_masks.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, mask in self._nm_masks.items():
            mask.move(fn)
            if mask.dense.dtype != before[name] and mask.shard is None:
                # as of a model of that dtype into which this one's state is loaded
                draw_masks([mask], mask.run.step, follow_prior=False)
        return self

    def __delattr__(self, name: str) -> None:
        caller = _caller(1)
        if name in self._nm_masks and caller == "torch.nn.utils.parametrize":
            raise _no_parameter(self._nm_masks[name], name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Any) -> None:
        """As of any module; a computed weight is no parameter.

        Raises:
            PlanError: if ``param`` is what the masked weight evaluates to.
        """
        if isinstance(param, ComputedWeight) and not isinstance(param, nn.Parameter):
            key = next((k for k in self._nm_masks if name.startswith(k)), None)
            if key is not None:
                raise _no_parameter(self._nm_masks[key], key)
        own = {k + ending for k in self._nm_masks for ending in (LOGITS, PRIOR)}
        if name in own and _caller(1).startswith(SHARDING):
            return  # copied to every rank as it is; we cut it as the weight is cut
        super().register_parameter(name, param)
        if name in self._nm_masks and param is not None and is_sharded(param):
            self._follow()

    def _managed(self) -> bool:
        return bool(self.__dict__.get("_fsdp_managed", False))

    def _manage(self, managed: bool) -> None:
        """What ``fully_shard`` sets last: scores are cut before an optimizer is given them.

        Raises:
            PlanError: if its predecessor sets it, which is about to flatten parameters.
        """
        if _caller(2).startswith(FSDP1):
            raise _fsdp1(self._nm_mask)
        self.__dict__["_fsdp_managed"] = managed
        self._follow()

    _is_fsdp_managed_module = _FalseOfClass(_managed, _manage)

    def _follow(self) -> None:
        for mask in self._nm_masks.values():
            if mask.there:
                _ = mask.dense  # which cuts what belongs to its mask as it is cut

    def extra_repr(self) -> str:
        """The module's own description, the patterns and the method."""
        masks = self._nm_masks
        patterns = [
            f"{'nm' if key == 'weight' else key}={mask.view.nm}" for key, mask in masks.items()
        ]
        own = [super().extra_repr()] if super().extra_repr() else []
        return ", ".join([*own, *patterns, f"method={self._nm_mask.method.name}"])


def attach(
    holders: list[tuple[nn.Module, str]],
    mask: MaskedWeight,
    scores: nn.Parameter | None,
    prior: nn.Parameter | None,
) -> None:
    """Mask the one weight that ``holders`` share (mostly a single layer), in place.

    Args:
        holders: modules that hold the same Parameter, each with its key there.
        mask: of that weight.
        scores: its initial scores, if the method has any.
        prior: the strength of its moving prior, likewise.
    """
    for module, key in holders:
        for ending, own in ((LOGITS, scores), (PRIOR, prior)):
            if own is not None:
                module.register_parameter(key + ending, own)
        masks = module.__dict__.setdefault("_nm_masks", {})
        masks[key] = mask
        surgery.extend(module, MaskedLayer, tuple(masks), prefix="Masked")


def refuse_unmaskable(name: str, module: nn.Module) -> None:
    """Try whether ``module`` can be given a class with masks; it keeps its own.

    Raises:
        PlanError: if its class cannot be extended in place.
    """
    why = surgery.why_not_extended(module, MaskedLayer)
    if why:
        raise PlanError(
            f"{name} is held by a module that cannot be masked: {why}; keep it dense by "
            f"rules=[Rule({name!r}, action='ignore')]"
        )


def detach(layer: MaskedLayer) -> None:
    """Give the layer its own class back and drop logits and masks; the weights stay as they are."""
    surgery.restore(layer)
    masks: dict[str, MaskedWeight] = layer.__dict__.pop("_nm_masks")
    for key, mask in masks.items():
        mask.run.close()
        for ending in (LOGITS, PRIOR):
            if key + ending in layer._parameters:
                delattr(layer, key + ending)  # not popped: rockpool keeps a list of its own


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """Qualified name and module of every module with masked weights, each once."""
    for name, module in nn.Module.named_modules(model):
        if isinstance(module, MaskedLayer):
            yield name, module


def masked_weights(model: nn.Module) -> Iterator[tuple[str, MaskedLayer, MaskedWeight]]:
    """Every masked weight, named as in a plan: by its layer, or a raw parameter by itself.

    A mask that is shared comes once for each name.
    """
    for name, layer in masked_layers(model):
        for key, mask in layer._nm_masks.items():
            raw = key != "weight" or not is_weight_layer(layer)
            yield f"{name}.{key}".lstrip(".") if raw else name, layer, mask


def _properties(key: str, *, copies: bool) -> dict[str, property]:
    """Those of one weight; ``copies``: whether the class is one of those that copy others'."""

    def masked(layer: MaskedLayer) -> Tensor:
        there = layer._parameters.get(key)
        if there is not None and not torch.compiler.is_compiling():
            reader = _caller(1)
            if reader.startswith(_COPIERS) and not copies:
                raise _copied(layer._nm_masks[key])
            if reader.startswith("torch.distributed.") and reader != __name__:
                return layer._nm_masks[key].as_stored(there)
        if layer._parameters.get(key) is None:  # taken out: what any module says of it follows
            raise AttributeError(key)
        try:
            return _masked(layer._nm_masks[key], layer.training)
        except AttributeError as error:  # after which a module would hand out the dense weight
            raise RuntimeError(f"{key} of a masked layer: {error}") from error

    def refuse(layer: MaskedLayer, value: object) -> None:
        mask = layer._nm_masks[key]
        if layer._parameters.get(key) is None and mask.own is not None:  # half done: put it back
            layer.register_parameter(key, mask.own)
            for ending in ("_g", "_v", "_orig"):
                layer._parameters.pop(key + ending, None)
        raise _no_parameter(mask, key)

    def dense(layer: MaskedLayer) -> Tensor:
        return layer._nm_masks[key].dense

    def meta(layer: MaskedLayer) -> Tensor:
        return meta_of(layer._nm_masks[key])

    def momentum(layer: MaskedLayer) -> Tensor:
        mask = layer._nm_masks[key]
        if not mask.learns:
            raise AttributeError(key + MOMENTUM)
        return stored_momentum(mask)

    def credits(layer: MaskedLayer) -> Tensor:
        mask = layer._nm_masks[key]
        if mask.guide is None:
            raise AttributeError(key + EID_KEY)
        return stored_credits(mask)

    return {
        key: property(masked, refuse),
        key + DENSE: property(dense),
        key + META: property(meta),
        key + MOMENTUM: property(momentum),  # names of a state dict are looked for at its module
        key + EID_KEY: property(credits),
    }


def _caller(depth: int) -> str:
    """Name of the module whose code has called who asks, ``depth`` functions above it."""
    return str(sys._getframe(depth + 1).f_globals.get("__name__"))


def _fsdp1(mask: MaskedWeight) -> PlanError:
    return PlanError(
        f"{mask.name} {mask.whole.shape} is masked, and FullyShardedDataParallel flattens "
        "parameters, which cuts blocks: use its successor, torch.distributed.fsdp.fully_shard"
    )


def _copied(mask: MaskedWeight) -> PlanError:
    return PlanError(
        f"{mask.name} {mask.whole.shape} is masked, and a tensor parallel layer is about to copy "
        "the masked weight of this step without its mask: build tensor parallel layers of the "
        "dense model, and call spikenm_fx.sparsify afterwards"
    )


def _no_parameter(mask: MaskedWeight, key: str) -> PlanError:
    return PlanError(
        f"{mask.name} {mask.view.shape} is masked: its {key} is computed at each access, and only "
        "an nn.Parameter can be put in its place. Weight norms, parametrizations and torch's "
        "pruning of this weight must be there before spikenm_fx.sparsify, or come after "
        "spikenm_fx.fold"
    )


def _listing_dense(list_attributes: Callable[..., Any]) -> Callable[..., Any]:
    def listed(layer: MaskedLayer, *args: Any, **kwargs: Any) -> Any:
        found = list_attributes(layer, *args, **kwargs)
        return found | {k: mask.dense for k, mask in layer._nm_masks.items() if k in found}

    return listed


def _masked(mask: MaskedWeight, training: bool) -> Tensor:
    if mask.raw:
        return mask.dense
    if torch.compiler.is_compiling():
        return mask.masked_in_graph(training)
    scores, dense = mask.scores, mask.dense
    dense = dense if mask.gathered is None else mask.gathered
    parameters = (dense,) if scores is None else (dense, scores)
    return read_parameter(parameters, lambda: mask.masked(training))
