# SPDX-License-Identifier: Apache-2.0
"""How much each weight is worth: its magnitude, that times the root of the rate, or credits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from spikenm_fx._torch import ConvTransposeNd
from spikenm_fx.errors import PlanError
from spikenm_fx.plan import LayerPlan
from spikenm_fx.state import preserved_in_eval, reset_to_rest

__all__ = ["Score", "WeightScores", "weight_scores"]

WeightScores: TypeAlias = Mapping[str, Tensor]
"""By the names of a plan; each of the shape of its weight and not negative."""
Score: TypeAlias = Literal["magnitude", "rate"] | WeightScores


def weight_scores(
    model: nn.Module, example_inputs: tuple[Any, ...], layers: tuple[LayerPlan, ...], score: Score
) -> dict[str, Tensor]:
    """The scores of the weights of ``layers``, float32 on the CPU.

    ``"magnitude"`` is |W|.  ``"rate"`` is |W| sqrt(E[x^2]) with x the input on the examples; for
    spikes E[x^2] is the firing rate (Wanda's score, as SparseSNN uses it for spikes).  A mapping
    gives them directly, e.g. :func:`spikenm_fx.masks.credits.learnt_credits`; layers that it does
    not name count by magnitude.

    Raises:
        PlanError: for an unknown score, or given ones that are negative, not finite or of another
            shape than their weight.
    """
    if isinstance(score, str) and score not in ("magnitude", "rate"):
        raise PlanError(
            f"score {score!r} is not known: 'magnitude', 'rate', or a mapping of layer names to "
            "tensors of the weights' shapes"
        )
    weights = {layer.name: layer.find(model) for layer in layers}
    found = {n: w.detach().abs().float().cpu() for n, w in weights.items() if w is not None}
    for name, values in found.items():
        if not bool(torch.isfinite(values).all()):
            raise PlanError(
                f"{name} {tuple(values.shape)} holds NaN or infinity: no order of its channels is "
                "better than another; load or initialise finite weights first"
            )
    if not isinstance(score, str):
        return found | _checked(score, found)
    if score == "rate":
        for name, power in _input_power(model, example_inputs, layers).items():
            found[name] = found[name] * power.sqrt()
    return found


def _checked(given: WeightScores, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unknown = sorted(set(given) - set(weights))
    if unknown:
        raise PlanError(
            f"scores were given for {unknown[0]}, which does not become N:M here; "
            f"those that do: {', '.join(sorted(weights)[:8])}"
        )
    for name, scores in given.items():
        seen, wanted = tuple(scores.shape), tuple(weights[name].shape)
        if seen != wanted:
            raise PlanError(f"{name}: scores of shape {seen} for a weight of shape {wanted}")
        if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
            raise PlanError(f"{name} {wanted}: scores must be finite and not negative")
    return {name: scores.detach().float().cpu() for name, scores in given.items()}


def _input_power(
    model: nn.Module, example_inputs: tuple[Any, ...], layers: tuple[LayerPlan, ...]
) -> dict[str, Tensor]:
    """Mean square of each layer's input channels, shaped to multiply its weight."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    modules = {layer.name: layer.holder(model) for layer in layers}
    wanted = {name: module for name, (module, key) in modules.items() if key == "weight"}
    with preserved_in_eval(model), contextlib.ExitStack() as hooks:
        reset_to_rest(model)
        for name, module in wanted.items():
            hooks.enter_context(_watching_inputs(module, name, sums, counts))
        model(*example_inputs)
    return {
        name: _beside_weight(wanted[name], total / counts[name]) for name, total in sums.items()
    }


@contextlib.contextmanager
def _watching_inputs(
    module: nn.Module, name: str, sums: dict[str, Tensor], counts: dict[str, int]
) -> Iterator[None]:
    spatial = getattr(module, "weight").dim() - 2  # noqa: B009  # typed as a Tensor or a Module

    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().float()
        channel = x.dim() - 1 - spatial
        squares = x.square().movedim(channel, -1).flatten(0, -2)
        sums[name] = sums.get(name, 0.0) + squares.sum(0).cpu()
        counts[name] = counts.get(name, 0) + squares.shape[0]

    handle = module.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _beside_weight(module: Any, power: Tensor) -> Tensor:
    """``[channels]`` as a factor of the weight, whose groups each read their own channels."""
    weight: Tensor = module.weight
    if isinstance(module, ConvTransposeNd):
        return power.reshape(-1, *[1] * (weight.dim() - 1))
    groups = int(getattr(module, "groups", 1))
    rows = power.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
