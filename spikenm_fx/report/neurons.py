# SPDX-License-Identifier: Apache-2.0
"""Firing rates, seen from outside: a neuron is what turns an analog signal into spikes.

No framework is asked.  Among the modules without weight layers inside, those whose input is analog
and whose output is {0, 1} over all batches are the neurons; of nested ones (a neuron holds its
surrogate) the outer one counts, unless it is a mere container.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.report.data import NeuronReport
from spikenm_fx.report.synops import SIGNALS, Signal, one_level, signal_kind

__all__ = ["NeuronWatch"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(slots=True)
class _Seen:
    inputs: Signal = "spike"
    outputs: Signal = "spike"
    spikes: float = 0.0
    elements: int = 0
    fired: Tensor | None = None
    mixed_shapes: bool = False

    def add(self, inputs: Tensor, output: Tensor) -> None:
        if one_level(inputs) is None:
            self.inputs = _worse(self.inputs, signal_kind(inputs))
        if one_level(output) is not None:
            output = (output != 0).to(output.dtype)  # spikes of whatever height
        self.outputs = _worse(self.outputs, signal_kind(output))
        if self.outputs != "spike":
            return
        self.spikes += float(output.sum())
        self.elements += output.numel()
        # Batch and time are the leading axes; a neuron keeps its place behind them.
        active = (output != 0).reshape(-1, *_neuron_shape(output)).any(0).cpu()
        if self.fired is None:
            self.fired = active
        elif self.fired.shape == active.shape:
            self.fired = self.fired | active
        else:
            self.mixed_shapes = True

    @property
    def is_neuron(self) -> bool:
        return self.elements > 0 and self.inputs != "spike" and self.outputs == "spike"

    @property
    def rate(self) -> float:
        return self.spikes / self.elements if self.elements else 0.0

    @property
    def silent(self) -> float | None:
        if self.fired is None or self.mixed_shapes:
            return None
        return 1.0 - float(self.fired.float().mean())


@dataclass(slots=True)
class NeuronWatch:
    """Watches candidate modules while batches run.

    Attributes:
        candidates: modules without weight layers inside, by name.
    """

    candidates: Mapping[str, nn.Module]
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _next: dict[str, list[str]] = field(default_factory=dict)
    _waiting: list[str] = field(default_factory=list)

    @classmethod
    def of_model(cls, model: nn.Module) -> NeuronWatch:
        """The candidates of ``model``."""
        return cls(
            {
                name: module
                for name, module in model.named_modules()
                if name
                and not isinstance(module, _CONTAINERS)
                and not any(is_weight_layer(inner) for inner in module.modules())
            }
        )

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the candidates report to this watch."""
        with contextlib.ExitStack() as stack:
            for name, module in self.candidates.items():
                stack.callback(module.register_forward_hook(self._hook(name)).remove)
            yield

    def layer_ran(self, name: str) -> None:
        """A weight layer ran: what fires next is what it feeds."""
        if name in self._next or name in self._waiting:
            # The next step or batch begins: who still waits (a head) feeds no neuron.
            self._waiting.clear()
        else:
            self._waiting.append(name)

    def rate_after(
        self, layer: str, driven: Sequence[str] = (), known: Iterable[str] = ()
    ) -> float | None:
        """Firing rate of the neuron that ``layer`` feeds, or None.

        Args:
            layer: name of a weight layer.
            driven: the neurons it drives, as a trace tells; without any, the first neuron that ran
                after it, which misleads only where branches run side by side.
            known: all neurons of the trace: whom they drive is told, so order says nothing of them.
        """
        seen = [self._seen[name] for name in driven if name in self._seen]
        rates = [one.rate for one in seen if one.outputs == "spike"]
        if rates:
            return sum(rates) / len(rates)
        chosen, told = self._neurons(), frozenset(known)
        for name in self._next.get(layer, ()):
            if name in chosen and not any(_nested(name, other) for other in told):
                return chosen[name].rate
        return None

    def reports(self) -> tuple[NeuronReport, ...]:
        """One record per neuron layer, in the model's order."""
        return tuple(
            NeuronReport(name, seen.rate, seen.silent) for name, seen in self._neurons().items()
        )

    def _neurons(self) -> dict[str, _Seen]:
        found: dict[str, _Seen] = {}
        for name in self.candidates:
            seen = self._seen.get(name)
            inside = any(name.startswith(outer + ".") for outer in found)
            if seen is not None and seen.is_neuron and not inside:
                found[name] = seen
        return found

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            spikes = output[0] if isinstance(output, tuple) and output else output
            inputs = args[0] if args else None
            if not isinstance(inputs, Tensor) or not isinstance(spikes, Tensor):
                return
            seen = self._seen.setdefault(name, _Seen())
            seen.add(inputs, spikes)
            for layer in self._waiting:
                self._next.setdefault(layer, []).append(name)
            if seen.is_neuron:
                self._waiting.clear()

        return hook


def _worse(a: Signal, b: Signal) -> Signal:
    return SIGNALS[max(SIGNALS.index(a), SIGNALS.index(b))]


def _nested(name: str, other: str) -> bool:
    """Whether one is the other, or inside it."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _neuron_shape(output: Tensor) -> tuple[int, ...]:
    """Channels and space of a batch's output; leading axes are batch and time."""
    return tuple(output.shape[-3:]) if output.dim() >= 4 else tuple(output.shape[-1:])
