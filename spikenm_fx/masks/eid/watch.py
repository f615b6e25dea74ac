# SPDX-License-Identifier: Apache-2.0
"""What layers and the neurons behind them receive, kept on refresh steps only.

Nothing is computed in a forward pass: inputs are kept by reference until the backward pass asks
for the credits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import data_parallel_group, in_backward, is_captured, tree_leaves
from spikenm_fx.masks.eid.connect import connect, postpone
from spikenm_fx.masks.eid.forward_hooks import first_of
from spikenm_fx.masks.eid.locate import locate
from spikenm_fx.masks.eid.look import can_learn, look
from spikenm_fx.masks.eid.replay import Call
from spikenm_fx.masks.eid.settings import EID
from spikenm_fx.masks.eid.slopes import Neuron, Source, Use
from spikenm_fx.masks.run import Run
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.trace import NeuronSpec

__all__ = ["Watch"]


class Watch:
    """Everything watched in one model.

    Args:
        run: of the model's masks.
        schedule: after its freeze nothing is watched any more.
        settings: of the distillation.

    Attributes:
        awake: whether credits are due in this step: a plain value, by which compiled graphs tell
            the steps in which hooks do nothing, and which need no break.
        connecting: whether a trace runs the model.
        looking: whether the model is run before it is compiled.
        postponed: whether it was said that a trace waits.
        seen_step: the step of what is kept.
    """

    def __init__(self, run: Run, schedule: Schedule, settings: EID) -> None:
        self.run, self.schedule, self.every = run, schedule, settings.every
        self.needs_neuron = settings.needs_neuron
        self.sources: list[Source] = []
        self.neurons: dict[str, Neuron] = {}
        self.notes: dict[str, str] = {}
        self.ranks: Any = None  # process group of the data parallel model around, if there is one
        self.seen_step, self._order, self._closed = -1, 0, -1
        self.connecting = False
        self.looking = False
        self.postponed = False
        self.wake()

    def wake(self) -> None:
        """Go on to the optimizer step that the run has come to."""
        self.awake = self._due()

    def _due(self) -> bool:
        rhythm = self.run.rhythm
        return rhythm % self.every == 0 and not self.schedule.frozen(rhythm)

    @property
    def busy(self) -> bool:
        """Whether the library itself runs the model."""
        return self.connecting or self.looking

    @property
    def connected(self) -> bool:
        """Whether every layer knows what it drives."""
        return not self.needs_neuron or all(source.connected for source in self.sources)

    # What hooks ask for, which cannot import what makes hooks.

    def connect(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the neuron behind each layer inside ``module`` and hook it."""
        connect(self, module, args, kwargs)

    def postpone(self) -> None:
        """A transform or a tracer runs, whose tensors no trace can read: say so once."""
        postpone(self)

    def can_learn(self, module: nn.Module) -> bool:
        """Whether :meth:`look` at ``module`` would show anything that is not known yet."""
        return can_learn(self, module)

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn of the neurons in ``module`` what a compiled graph cannot be asked."""
        look(self, module, args, kwargs)

    def recording(self, module: nn.Module, one: Source | Neuron, *, compiled: bool = False) -> bool:
        """Whether this call of a layer or neuron is to be kept.

        Compiled graphs run without gradients, and were made for a forward pass that has some.  Of
        checkpointed parts the forward is kept, where it runs with gradients, and else (reentrant
        checkpoints) its recomputation inside of backward; the first pass of a step alone.
        """
        step = self.run.step
        if not in_backward():
            self.ranks = data_parallel_group()
        if (
            not module.training
            or self.connecting
            or not self._due()
            or is_captured()
            or not (compiled or torch.is_grad_enabled())
        ):
            return False
        if self.seen_step != step:
            self.forget()
            self.seen_step = step
        if self.looking:
            return True
        late = in_backward()
        sources = self._sources_of(one)
        closed = any(source.closed == step or source.lent for source in sources)
        seen = one.uses if isinstance(one, Source) else one.calls
        if not seen:
            one.late = late
        return not closed and self._closed != step and one.late is late

    def _sources_of(self, one: Source | Neuron) -> list[Source]:
        if isinstance(one, Source):
            return [one]
        return [source for source in self.sources if one in source.posts]

    def warn_if_blind(self) -> None:
        """Say once that a refresh was due, but that no forward was seen."""
        for source in self.sources:
            if source.alone:
                self.missed(source)
        if self._due() and self.sources and self._blind():
            self.run.warn(
                "blind",
                f"EID saw no forward of a masked layer in step {self.run.step}, where its credits "
                "were due, so that it is off, or stays with the credits it had: the transforms of "
                "torch.func and exported graphs run no hooks. Call the model itself at every "
                f"{self.every}th step, or use SpikeNM(eid=None)",
            )

    def _blind(self) -> bool:
        watched = [
            source
            for source in self.sources
            if not source.frozen
            and (source.posts or not self.needs_neuron or self._waits_for(source))
        ]
        return self.seen_step != self.run.step and bool(watched)

    def _waits_for(self, source: Source) -> bool:
        """Whether no call of a module has shown yet what a layer drives, and nobody said why."""
        return not source.connected and not self.postponed

    def missed(self, source: Source) -> None:
        """A layer is called by itself: no call of a module shows what it drives.  Say so once."""
        if self.needs_neuron and not source.connected:
            source.connected = True
            self.run.warn(
                "unconnected",
                f"EID is off for {source.name}: the training loop calls it by itself, so that no "
                "forward of a module shows which neuron it drives; "
                "sparsify(model, example_inputs=...) shows it",
            )

    def close(self) -> None:
        """The credits of this step are being asked for: nothing more is kept for it."""
        self._closed = self.run.step

    def forget(self) -> None:
        """Let go of everything that was kept."""
        self._order = 0
        for source in self.sources:
            source.forget()
        for neuron in self.neurons.values():
            neuron.calls.clear()
            neuron.slopes = neuron.known = None

    def order(self) -> int:
        """A running number."""
        self._order += 1
        return self._order

    def saw_layer(
        self, source: Source, inputs: Tensor, shape: torch.Size, output: Tensor | None
    ) -> None:
        """A layer was called.

        Args:
            source: the layer.
            inputs: what it was called on, of any shape; kept by reference.
            shape: of what it gave.
            output: that itself with its graph; None where nothing could be asked of that.
        """
        if source.frozen:
            return
        kept = output if self.needs_neuron and not source.same_order else None
        source.uses.append(Use(self.order(), inputs.detach(), shape, kept))

    def saw_neuron(
        self, neuron: Neuron, args: tuple[Any, ...], kwargs: dict[str, Any], askable: bool
    ) -> None:
        """A neuron is about to be called; ``askable``: its graph can be walked now."""
        current, rest, kwargs = first_of(args, kwargs)
        if not isinstance(current, Tensor):
            return
        call = Call(self.order(), current.detach(), rest, kwargs, starts=True)
        neuron.learn_time(call)
        spec = neuron.spec()
        call.starts = not neuron.calls or _starts(neuron.module, spec, rest)
        neuron.calls.append(call)
        for source in self.sources:
            if askable and neuron in source.posts and source.uses:
                locate(self, source, neuron, spec, current)

    def heard_of_neuron(
        self,
        neuron: Neuron,
        current: Tensor,
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Sequence[Tensor],
    ) -> None:
        """The same from inside of a compiled graph, which cannot be asked anything.

        Args:
            neuron: that is about to be called.
            current: its input, of any shape.
            rest: further arguments.
            kwargs: keyword arguments.
            state: tensors that the module holds of the steps before.
        """
        carried = [v for v in tree_leaves(rest) if isinstance(v, Tensor)] if rest else state
        starts = not neuron.calls or not any(bool(value.any()) for value in carried)
        neuron.calls.append(Call(self.order(), current, rest, kwargs, starts))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": -1, "_order": 0, "ranks": None}


def _starts(module: nn.Module, spec: NeuronSpec, rest: tuple[Any, ...]) -> bool:
    """Whether the state is that of a new sequence: none, empty, or zero everywhere."""
    if spec.step_mode == "multi":
        return True
    own = [getattr(module, name, None) for name in spec.state[:1]]
    state = tree_leaves(rest) if rest else own
    tensors = [value for value in state if isinstance(value, Tensor)]
    return not any(bool(value.detach().any()) for value in tensors)
