# SPDX-License-Identifier: Apache-2.0
"""The signal of every recorded operation, from its inputs' and from what neurons emit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor, fx

from spikenm_fx.trace.analysis.ops import module_family, op_name
from spikenm_fx.trace.analysis.signal import ANALOG, Signal, constant, of_kind, transfer
from spikenm_fx.trace.channels.rules_nodes import is_container
from spikenm_fx.trace.execution.values import SurrogateCall, ValueInfo
from spikenm_fx.trace.neurons.spec import NeuronSpec

__all__ = ["Inference"]


class Inference:
    """Visit the operations in order; ``known`` holds what flows out of each.

    Args:
        specs: the neurons by name.
        note: told where a neuron emits something else than its kind.
    """

    def __init__(self, specs: Mapping[str, NeuronSpec], note: Callable[[str, str], None]) -> None:
        self.specs, self.note = specs, note
        self.known: dict[fx.Node, Signal] = {}

    def visit(self, node: fx.Node) -> None:
        """Add ``node``, whose inputs were visited before."""
        self.known[node] = self._of(node)

    def _of(self, node: fx.Node) -> Signal:
        info: ValueInfo | None = node.meta.get("value")
        if node.op == "placeholder":
            return of_kind(info.measured if info is not None and info.varied else None)
        if node.op == "get_attr":
            tensor = node.meta.get("tensor")
            if isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.is_floating_point():
                return constant(float(tensor.detach()))
            return of_kind(info.measured if info is not None else None)
        if node.op == "output":
            return ANALOG
        if node.op == "call_module":
            return self._module_signal(node, info)
        if isinstance(node.target, SurrogateCall):
            return of_kind(info.measured if info else None)
        source = node.args[0] if node.args else None
        if op_name(node) == "getitem" and isinstance(source, fx.Node) and is_container(source):
            return self._item_signal(node, source)
        return self._transfer(op_name(node), node)

    def _transfer(self, name: str, node: fx.Node) -> Signal:
        tensors: list[Signal] = []
        operands: list[Signal] = []

        def visit(arg: object) -> None:
            if isinstance(arg, fx.Node):
                tensors.append(self.known[arg])
                operands.append(self.known[arg])
            elif isinstance(arg, int | float):
                operands.append(constant(float(arg)) if math.isfinite(arg) else ANALOG)
            elif isinstance(arg, tuple | list):
                for item in arg:
                    visit(item)

        for arg in node.args:
            visit(arg)
        return transfer(name, tensors, operands, node)

    def _module_signal(self, node: fx.Node, info: ValueInfo | None) -> Signal:
        name, module = str(node.target), node.meta.get("module")
        spec = self.specs.get(name)
        if spec is not None:
            return self._neuron_signal(name, spec, info)
        if module is None or module_family(module) in ("layer", "norm"):
            return ANALOG
        return self._transfer(module_family(module), node)

    def _neuron_signal(self, name: str, spec: NeuronSpec, info: ValueInfo | None) -> Signal:
        if info is None or info.shape is None:
            return of_kind(spec.output) if spec.framework != "unknown" else ANALOG
        if spec.framework == "unknown":
            return of_kind(info.measured)
        if info.measured in (None, "spike") or spec.output == "analog":
            return of_kind(spec.output)
        if info.measured == "analog" or spec.output == "spike":
            self.note(name, f"known to emit {spec.output} but emitted {info.measured} values")
            return of_kind(info.measured)
        return of_kind(spec.output)

    def _item_signal(self, node: fx.Node, source: fx.Node) -> Signal:
        """An item of a tuple: the first of a neuron's results are its spikes, others its state."""
        info: ValueInfo | None = node.meta.get("value")
        spec = self.specs.get(str(source.target)) if source.op == "call_module" else None
        if spec is not None:
            if node.args[1] != 0:
                return ANALOG
            return self._neuron_signal(str(source.target), spec, info)
        if source.op == "call_module":
            return ANALOG
        return self.known[source]
