# SPDX-License-Identifier: Apache-2.0
"""The command line's use of packing: one place, so that the commands say the same of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from spikenm_fx.errors import PlanError
from spikenm_fx.plan.plan import Plan

__all__ = ["kernel_choices", "pack_model", "packed_output", "packing_available"]


def packing_available() -> bool:
    """Whether this version can turn a model into its packed inference copy."""
    return _verb() is not None


def _verb() -> Callable[..., nn.Module] | None:
    import spikenm_fx

    # Without the verb, the name is the package of the same name, which is not callable.
    found = vars(spikenm_fx).get("pack")
    return found if callable(found) else None


def packed_output(
    model: nn.Module,
    batch: Tensor,
    run: Callable[[nn.Module], Tensor],
    rest: Callable[[nn.Module], None],
) -> Tensor:
    """What the packed copy of ``model`` computes."""
    pack = _verb()
    if pack is None:
        raise PlanError("this version of spikenm_fx cannot pack models")
    engine = pack(model, batch)
    rest(engine)
    return run(engine)


def kernel_choices(
    model: nn.Module, batch: Tensor
) -> dict[str, tuple[str, float | None, str]] | None:
    """How each layer of a folded model will run here: choice, measured gain over dense, note.

    None where this version cannot pack models.
    """
    pack = _verb()
    if pack is None:
        return None
    # found by name: the report of packing is younger than this file's other imports
    packing = getattr(importlib.import_module("spikenm_fx.pack.engine"), "packing")  # noqa: B009
    found = packing(pack(model, batch))
    return {layer.name: (layer.choice, layer.gain, layer.note) for layer in found.layers}


def pack_model(model: nn.Module, decided: Plan, out: Path) -> dict[str, tuple[int, int]]:
    """Write the planned layers packed, all other tensors as they are.

    Returns:
        Dense and packed bytes of each packed weight, by layer.

    Raises:
        PlanError: if this version lacks the packed format.
    """
    if importlib.util.find_spec("spikenm_fx.pack") is None:
        raise PlanError("this version of spikenm_fx has no packed format yet")
    from spikenm_fx.pack.files import save_packed
    from spikenm_fx.pack.format import LayerGeometry, pack_weight

    weights, sizes = {}, {}
    for entry in decided.sparse:
        layer = model.get_submodule(entry.name)
        geometry = LayerGeometry.of_layer(layer, name=entry.name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert entry.nm is not None
        packed = pack_weight(weight.detach(), entry.nm, geometry=geometry, name=entry.name)
        weights[entry.name] = packed
        sizes[entry.name] = (weight.numel() * weight.element_size(), packed.nbytes)
    taken = {f"{name}.weight" for name in weights}
    rest = {key: value for key, value in model.state_dict().items() if key not in taken}
    save_packed(out, weights, tensors=rest)
    return sizes
