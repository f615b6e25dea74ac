# SPDX-License-Identifier: Apache-2.0
"""A layer whose ``weight`` is masked at every access, in the user's own class and under its keys.

The dense Parameter stays where it was (``_parameters["weight"]``): optimizers, weight-decay rules
and parameter names do not change.  The layer's class becomes a subclass of its own class in which
the property ``weight`` returns the masked tensor; state dicts, pickling and copying are taught the
difference in that subclass, so no hook is ever installed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # lazy, unlike torch.compiler.disable

from spikenm_fx.errors import CheckpointError
from spikenm_fx.masks.clock import Clock, version_of
from spikenm_fx.masks.methods import Draw, Method
from spikenm_fx.masks.noise import noise_key
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import BlockView

__all__ = ["MaskedLayer", "MaskedWeight", "mask_layer", "masked_layers", "unmask_layer"]

LOGITS = "weight_logits"
DENSE = "weight_dense"
META = "weight_nm"
_META_VERSION = 1


class MaskedWeight:
    """The mask of one weight: its blocks, its method, and the clock it shares with its model.

    Layers that share one Parameter share one ``MaskedWeight``.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        view: BlockView,
        method: Method,
        clock: Clock,
        schedule: Schedule,
    ) -> None:
        self.layer = layer  # the layer that owns weight and logits; the first of those that share
        self.name = name
        self.view = view
        self.method = method
        self.clock = clock
        self.schedule = schedule
        self._cache: _Cached | None = None

    @property
    def dense(self) -> Tensor:
        """The weight parameter as the optimizer sees it."""
        weight = self.layer._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def scores(self) -> Tensor:
        """The learnable logits, ``(lead, M, inner)``."""
        scores = self.layer._parameters[LOGITS]
        assert scores is not None
        return scores

    def fresh_scores(self) -> Tensor:
        """Initial logits for the present weight."""
        with torch.no_grad():
            blocks = self.view.to_blocks(self.dense.detach())
            return self.method.init_scores(blocks, self.draw(0, blocks.device))

    def restart(self) -> None:
        """Start the logits anew, after a dense checkpoint brought other weights."""
        self.scores.data.copy_(self.fresh_scores())

    def versions(self) -> tuple[int, int]:
        """In-place version counters of weight and logits."""
        return version_of(self.dense), version_of(self.scores)

    def probe(self) -> tuple[Tensor, ...]:
        """A few values of weight and logits, spread over each: did somebody write to them?"""
        return tuple(
            flat[:: max(flat.numel() // 64, 1)].clone()
            for flat in (self.dense.detach().flatten(), self.scores.detach().flatten())
        )

    def draw(self, step: int, device: torch.device | None = None) -> Draw:
        """Everything the mask of optimizer step ``step`` depends on besides the tensors."""
        return Draw(
            nm=self.view.nm,
            key=noise_key(self.clock.seed, step, self.name),
            kappa=self.schedule.kappa_at(step),
            tau=self.schedule.tau_at(step),
            frozen=self.schedule.frozen(step),
            present=self.view.present(device or self.scores.device),
        )

    @torch.no_grad()
    def mask(self, step: int | None = None) -> Tensor:
        """The bool mask of the weight's shape: of a training step, or the final one for None."""
        draw = self.draw(self.clock.step if step is None else step)
        choose = self.method.final_mask if step is None else self.method.train_mask
        blocked = choose(self.view.to_blocks(self.dense.detach()), self.scores.detach(), draw)
        return self.view.from_blocks(blocked)

    @torch.no_grad()
    def final_weight(self) -> Tensor:
        """The weight under the final mask: what evaluation uses and ``fold`` bakes in."""
        return self.dense.detach().masked_fill(~self.mask(), 0)

    def masked(self, training: bool) -> Tensor:
        """The weight that the layer uses now: at most N non-zeros in each block of M."""
        step = self.clock.now(self) if training else None
        state = self._state(step)
        if self._cache is None or state is None or self._cache.state != state:
            context = _Context(self, step)
            masked = _MaskedFunction.apply(self.dense, self.scores, self.mask(step), context)  # type: ignore[no-untyped-call]
            self._cache = _Cached(state, self.dense, masked)
        return self._cache.masked

    def _state(self, step: int | None) -> tuple[Any, ...] | None:
        """What the cached tensor depends on; None where finding out costs more than masking."""
        content: tuple[int, ...] = ()
        if step is None:  # nothing but the content can tell of writes through ``.data``
            if self.dense.device.type != "cpu":
                return None
            content = (_checksum(self.dense), _checksum(self.scores))
        return (
            step,
            *self.versions(),
            *content,
            id(self.dense),
            self.dense.data_ptr(),
            self.dense.requires_grad,
            self.scores.requires_grad,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}


@dataclass(slots=True)
class _Cached:
    state: tuple[Any, ...] | None
    dense: Tensor  # kept so that its id is not given to another tensor
    masked: Tensor


class _Context:
    """What the backward pass needs; it holds no layer, so that no graph keeps a model alive."""

    __slots__ = ("clock", "dense", "draw", "method", "scores", "training", "versions", "view")

    def __init__(self, owner: MaskedWeight, step: int | None) -> None:
        self.dense, self.scores = owner.dense, owner.scores
        self.view, self.method, self.clock = owner.view, owner.method, owner.clock
        self.draw = owner.draw(step or 0)
        self.training = step is not None
        self.versions = owner.versions()

    def score_grad(self, grad: Tensor) -> Tensor | None:
        """Gradient of the scores from that of the masked weight; dL/dm = dL/d(w m) * w."""
        if (
            version_of(self.dense) != self.versions[0]
            or version_of(self.scores) != self.versions[1]
        ):
            raise RuntimeError(
                "a masked weight or its logits were written to between forward and backward; "
                "call backward before optimizer.step()"
            )
        weight, scores = self.dense.detach(), self.scores.detach()
        grad_mask, blocks = self.view.to_blocks(grad * weight), self.view.to_blocks(weight)
        grad_scores = self.method.score_grad(grad_mask, blocks, scores, self.draw)
        return None if grad_scores is None else grad_scores.to(scores.dtype)


class _MaskedFunction(torch.autograd.Function):
    """weight, logits -> masked weight; one node per step, shared by all T calls of the layer.

    Nothing goes through ``save_for_backward``: the node must survive several backward passes
    (gradient accumulation), and a recomputed checkpoint may find it in the cache.  Alive between
    forward and backward are the masked weight and one bool mask.
    """

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor, context: _Context) -> Tensor:
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.mask, ctx.context = inputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        context: _Context = ctx.context
        needs_weight, needs_scores, *_ = ctx.needs_input_grad
        grad_scores = None
        if needs_scores and context.training:
            grad_scores = context.score_grad(grad)
        context.clock.note_backward(scores_too=grad_scores is not None)
        return grad.masked_fill(~ctx.mask, 0) if needs_weight else None, grad_scores, None, None


def _checksum(tensor: Tensor) -> int:
    """Sum of the bit patterns: differs after any single change."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(word).sum())


class MaskedLayer(nn.Module):
    """Mixin in front of the user's layer class; made by :func:`mask_layer`, undone by ``fold``."""

    _nm_mask: MaskedWeight
    _plain_class: type[nn.Module]

    @property
    def weight(self) -> Tensor:
        """The masked weight, N:M at every access; differentiable to the dense weight."""
        return _masked(self._nm_mask, self.training)

    @property
    def weight_dense(self) -> Tensor:
        """The dense parameter behind the mask."""
        return self._nm_mask.dense

    @property
    def weight_nm(self) -> Tensor:
        """int64 ``[format version, keep, of, seed, step]``, what a checkpoint stores."""
        mask = self._nm_mask
        nm, clock = mask.view.nm, mask.clock
        return torch.tensor([_META_VERSION, nm.keep, nm.of, clock.seed, clock.settle()])

    def extra_repr(self) -> str:
        """The layer's own description and the pattern."""
        mask = self._nm_mask
        return f"{super().extra_repr()}, nm={mask.view.nm}, method={mask.method.name}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + DENSE] = destination[prefix + "weight"]
        destination[prefix + "weight"] = self._nm_mask.final_weight()
        destination[prefix + META] = self.weight_nm

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
        dense = state_dict.pop(prefix + DENSE, None)
        meta = state_dict.pop(prefix + META, None)
        if dense is not None:
            state_dict[prefix + "weight"] = dense
        from_dense_model = prefix + LOGITS not in state_dict
        if from_dense_model:
            state_dict[prefix + LOGITS] = self._parameters[LOGITS]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if from_dense_model:
            state_dict.pop(prefix + LOGITS)
        if meta is not None:
            _, _, _, seed, step = meta.tolist()
            mask.clock.set(seed=seed, step=step)
        else:
            mask.clock.set(seed=mask.clock.seed, step=mask.clock.settle())
            if mask.clock.step == 0 and prefix + "weight" in state_dict:
                mask.restart()

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))[2:]
        return (_new_masked, (plain_class(self),), *state)


def mask_layer(
    layers: list[nn.Module],
    name: str,
    view: BlockView,
    method: Method,
    clock: Clock,
    schedule: Schedule,
) -> None:
    """Mask the one weight that ``layers`` share (mostly a single layer), in place.

    Args:
        layers: Linear or Conv modules that hold the same ``weight`` Parameter.
        name: qualified name of the first, which keys the noise.
        view: blocks of the weight.
        method: how masks are chosen.
        clock: shared by the model's masked weights.
        schedule: of scale, temperature and freeze.
    """
    mask = MaskedWeight(layers[0], name, view, method, clock, schedule)
    logits = nn.Parameter(mask.fresh_scores())
    for layer in layers:
        layer.register_parameter(LOGITS, logits)
        layer.__dict__["_nm_mask"] = mask
        layer.__class__ = _masked_class(cast("Any", type(layer)))


def unmask_layer(layer: MaskedLayer) -> None:
    """Give the layer its own class back and drop logits and mask; the weight stays as it is."""
    layer.__class__ = plain_class(layer)  # type: ignore[assignment]
    del layer._parameters[LOGITS], layer.__dict__["_nm_mask"]


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """Qualified name and module of every masked layer, each once."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            yield name, module


def plain_class(layer: MaskedLayer) -> type[nn.Module]:
    """The class that the user gave the layer."""
    return type(layer)._plain_class


@functools.cache
def _masked_class(plain: Any) -> Any:
    return type(f"Masked{plain.__name__}", (MaskedLayer, plain), {"_plain_class": plain})


def _new_masked(plain: type[nn.Module]) -> MaskedLayer:
    masked = _masked_class(cast("Any", plain))
    return cast("MaskedLayer", masked.__new__(masked))


@_disable_dynamo
def _masked(mask: MaskedWeight, training: bool) -> Tensor:
    """Outside of compiled graphs: the step counter would recompile them at every step."""
    return mask.masked(training)


def check_checkpoint(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Load hook of the root: refuse a foreign checkpoint before a single tensor is copied.

    Raises:
        CheckpointError: if a layer's pattern or the format version is another one.
    """
    wrong = []
    for name, layer in masked_layers(model):
        meta = state_dict.get(f"{prefix}{name}.{META}" if name else prefix + META)
        if meta is None:
            continue
        version, keep, of, *_rest = (*meta.tolist(), 0, 0, 0)[:3]
        nm, shape = layer._nm_mask.view.nm, tuple(layer.weight_dense.shape)
        if version != _META_VERSION:
            wrong.append(
                f"{name} {shape}: mask format {version}, this version reads {_META_VERSION}"
            )
        elif (keep, of) != (nm.keep, nm.of):
            wrong.append(f"{name} {shape}: checkpoint {keep}:{of}, model {nm}")
    if wrong:
        shown = "\n  ".join(wrong[:5] + ([f"... {len(wrong) - 5} more"] if len(wrong) > 5 else []))
        raise CheckpointError(
            f"the checkpoint does not fit the masks of {type(model).__name__}:\n  {shown}\n"
            "sparsify a dense model with the checkpoint's pattern before loading it"
        )
