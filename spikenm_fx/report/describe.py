# SPDX-License-Identifier: Apache-2.0
"""From what was counted to what is said about one layer."""

from __future__ import annotations

from torch import Tensor, nn

from spikenm_fx.pattern import NM, BlockView, WeightLayer, torch_class
from spikenm_fx.report.data import LayerReport
from spikenm_fx.report.energy import EnergyModel
from spikenm_fx.report.masks import block_histogram, detect_pattern, mask_tile, pe_utilisation
from spikenm_fx.report.synops import LayerCounter

__all__ = ["describe", "packed_bytes"]

_TILE_BLOCK = 4  # block borders drawn for layers without a pattern


def describe(
    name: str,
    layer: WeightLayer,
    counter: LayerCounter,
    *,
    rate_out: float | None,
    dense: Tensor | None,
    decision: tuple[str, str] | None,
    energy: EnergyModel,
    pes: int,
) -> LayerReport:
    """The record of one layer.

    Args:
        name: qualified name.
        layer: the layer, in eval mode.
        counter: what went through it.
        rate_out: firing rate behind it.
        dense: its weight before masking, of the weight's shape; None where it is not known.
        decision: the plan's action and reason, where known.
        energy: picojoule per operation.
        pes: processing elements of the utilisation figure.
    """
    weight, mask = layer.weight.detach(), counter.mask
    nm = _declared(layer) or detect_pattern(layer, mask)
    done = counter.operations()
    action, reason = decision or (("sparsify", "") if nm else ("keep_dense", ""))
    analog = counter.signal == "analog"
    return LayerReport(
        name=name,
        kind=torch_class(layer).__name__,
        shape=tuple(weight.shape),
        pattern=str(nm) if nm else None,
        action=action,
        reason=reason,
        density=_share(float(mask.sum()), mask.numel()),
        kept_magnitude=_kept(weight, mask, dense),
        signal=counter.signal,
        rate_in=None if analog or not counter.calls else _share(counter.total, counter.elements),
        rate_out=rate_out,
        input_density=_share(counter.active, counter.elements) if counter.calls else None,
        calls=counter.calls,
        operations=done,
        picojoule=energy.picojoule(done.synops, done.macs),
        picojoule_dense=energy.picojoule(done.synops_dense_weights, done.dense if analog else 0),
        utilisation=pe_utilisation(layer, mask, pes),
        cycles_spikes=counter.cycles_spikes,
        cycles_weights=counter.cycles_weights,
        dense_bytes=_bytes(layer, weight.numel(), weight.element_size()),
        packed_bytes=packed_bytes(layer, nm),
        blocks=block_histogram(layer, mask, nm) if nm else (),
        tile=mask_tile(layer, mask, nm.of if nm else _TILE_BLOCK),
        not_finite=int((~weight.isfinite()).sum()) if weight.is_floating_point() else 0,
        note="" if counter.calls else "never ran as a module",
    )


def packed_bytes(layer: WeightLayer, nm: NM | None) -> int:
    """Bytes of the layer's weight and bias when packed: kept values and their indices.

    Without a pattern they are those of the dense layer.  Else each block stores ``keep`` values
    and as many indices of ``ceil(log2(of))`` bits.
    """
    weight = layer.weight
    if nm is None:
        return _bytes(layer, weight.numel(), weight.element_size())
    packed = BlockView.of_layer(layer, nm).packed_bytes(weight.element_size())
    return _bytes(layer, 0, 0) + packed


def _bytes(layer: WeightLayer, values: int, size: int) -> int:
    bias = layer.bias.numel() * layer.bias.element_size() if layer.bias is not None else 0
    return values * size + bias


def _declared(layer: nn.Module) -> NM | None:
    """The pattern a masked layer carries itself."""
    meta = getattr(layer, "weight_nm", None)
    if not isinstance(meta, Tensor) or meta.numel() < 3:
        return None
    _, keep, of, *_rest = meta.tolist()
    return NM(keep, of)


def _kept(weight: Tensor, mask: Tensor, dense: Tensor | None) -> float | None:
    if dense is None or dense.shape != weight.shape:
        return None
    magnitude = dense.double().abs()
    return _share(float(magnitude[mask.to(dense.device)].sum()), float(magnitude.sum()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
