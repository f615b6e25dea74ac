# SPDX-License-Identifier: Apache-2.0
"""The ranks of a data parallel model must have one and the same masks: asked once, then assured.

Masks cost no communication, as every rank computes them of the same weights, logits and numbers.
Weights and logits are given out by DistributedDataParallel when it wraps the model; numbers that
only ``sparsify`` knows (pattern, seed, length, method) and the step of a checkpoint are not, and a
rank that had others would train another model without a word.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.fingerprint import number_of
from spikenm_fx.masks.start import loaded

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight
    from spikenm_fx.masks.run import Run

__all__ = ["meet"]


def meet(run: Run, ranks: Any) -> None:
    """On the first training forward of data parallel or sharded ranks: one small collective.

    Masks that were drawn of a rank's own initial weights are drawn anew of those it was given.

    Args:
        run: of the model that is wrapped.
        ranks: the process group; None for the mesh over which its weights are sharded.

    Raises:
        PlanError: on every rank, if they differ in what their masks are made of.
    """
    run.ranks_met = True
    run.keep_rhythm(0)
    weights = [weight for weight in run.weights if weight.there]
    settings = {
        "pattern": [(weight.name, str(weight.view.nm), weight.whole.shape) for weight in weights],
        "method": [_described(weight.method) for weight in weights],
        "total_steps": [weight.schedule for weight in weights],
        "seed": run.seed,
        "step": run.step,
    }
    own = torch.tensor(
        [number_of(value) for value in settings.values()], dtype=torch.int64, device="cpu"
    )
    both = torch.stack((own, -own)).to(weights[0].mask.device)
    for group in [ranks] if ranks is not None else _ranks_of(weights):
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=group)
    largest, smallest = both.cpu()
    differ = [name for name, a, b in zip(settings, largest, -smallest, strict=True) if a != b]
    if differ:
        run.ranks_met = False
        here = ", ".join(f"{name}={_shown(settings[name])}" for name in differ)
        raise PlanError(
            f"the ranks of this data parallel model differ in {', '.join(differ)} of their masks, "
            f"here {here}: call sparsify with the same arguments on every rank, and load a "
            "checkpoint on every rank"
        )
    for weight in weights if ranks is not None else ():
        loaded(weight)


def _ranks_of(weights: list[MaskedWeight]) -> list[Any]:
    """The process groups of the mesh over which weights are sharded."""
    mesh = next(weight.shard.mesh for weight in weights if weight.shard is not None)
    return [mesh.get_group(axis) for axis in range(mesh.ndim)]


def _described(method: Any) -> str:
    return repr(method) if is_dataclass(method) else str(method.name)


def _shown(value: object) -> str:
    """What most weights have in common is said once."""
    return str(list(dict.fromkeys(map(str, value)))) if isinstance(value, list) else str(value)
