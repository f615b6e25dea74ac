# SPDX-License-Identifier: Apache-2.0
"""Which layers stay dense unless a rule names them: those that see analog input, and the head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["DefaultRole", "default_roles"]


@dataclass(frozen=True, slots=True)
class DefaultRole:
    """A layer's place in its model.

    Attributes:
        place: what keeps it dense by default.
        reason: the same for people.
    """

    place: Literal["input", "head"]
    reason: str


def default_roles(layers: Collection[str], graph: SpikingGraph | None) -> dict[str, DefaultRole]:
    """Roles from the graph; from the order of the module tree where no graph saw a layer.

    A layer that the traced forward does not use has none: sparse or dense, it computes nothing
    there, and where another forward uses it, nothing says that it sees the input or is a head.  So
    examples leave no such layer dense that would be sparse without them; and where no forward ran,
    the last layer is taken for the head if the graph does not know of it, as examples would show.
    """
    if graph is None:
        return _by_order(list(layers))
    seen = {name: record for name in layers if (record := graph.record(name)) is not None}
    if not any(record.calls for record in seen.values()):
        return _by_order(list(layers))
    roles: dict[str, DefaultRole] = {}
    for name, record in seen.items():
        signal = record.input_signal.kind if record.input_signal else "analog"
        if not record.calls:
            continue
        if signal != "spike" and record.multiplies_input:
            image = " image" if signal == "analog" and record.kind == "conv2d" else ""
            roles[name] = DefaultRole("input", f"input is {signal}{image}")
        elif record.is_readout and not record.feeds:
            roles[name] = DefaultRole("head", "feeds no neuron: readout")
    found = {role.place for role in roles.values()}
    if not graph.ran:
        for name, role in _by_order(list(seen)).items():
            if role.place not in found and not seen[name].calls:
                roles[name] = role
    return roles


def _by_order(names: list[str]) -> dict[str, DefaultRole]:
    if not names:
        return {}
    return {
        names[-1]: DefaultRole("head", "classifier head: last in the module tree"),
        names[0]: DefaultRole("input", "sees the analog input: first in the module tree"),
    }
