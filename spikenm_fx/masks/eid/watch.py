# SPDX-License-Identifier: Apache-2.0
"""Hooks that see, on refresh steps only, what layers and the neurons behind them receive.

Nothing is computed in a forward pass: inputs are kept by reference until the backward pass asks
for the credits.  Which neuron follows which layer comes from :mod:`spikenm_fx.trace`, with the
user's examples, or on the first training forward of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import (
    data_parallel_group,
    in_backward,
    is_captured,
    run_as_eager,
    tree_leaves,
    tree_map,
)
from spikenm_fx.errors import SpikeNMWarning, TraceError
from spikenm_fx.masks.eid.eligibility import (
    correlate,
    presynaptic_rate,
)
from spikenm_fx.masks.eid.forward_hooks import CallHook, FirstHook, LayerHook, NeuronHook, first_of
from spikenm_fx.masks.eid.replay import Call
from spikenm_fx.masks.eid.settings import EID
from spikenm_fx.masks.eid.slopes import (
    Neuron,
    Source,
    Use,
    in_layer_order,
    samples_seen,
    slopes_at,
    slopes_of,
)
from spikenm_fx.masks.eid.walk import gradients_without_hooks
from spikenm_fx.masks.gather import gathered_inside
from spikenm_fx.masks.run import Run
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.state import preserved
from spikenm_fx.trace import NeuronSpec, SpikingGraph, neuron_spec, trace

__all__ = ["Observed", "Watch", "hook_neuron", "watch_calls"]

_PROBES = (0.3719, 0.6173, 0.8317)  # no fixed points of the usual transpositions


class Watch:
    """Everything watched in one model.

    Args:
        run: of the model's masks.
        schedule: after its freeze nothing is watched any more.
        settings: of the distillation.

    Attributes:
        awake: whether credits are due in this step: a plain value, by which compiled graphs tell
            the steps in which hooks do nothing, and which need no break.
    """

    def __init__(self, run: Run, schedule: Schedule, settings: EID) -> None:
        self.run, self.schedule, self.every = run, schedule, settings.every
        self.needs_neuron = settings.needs_neuron
        self.sources: list[Source] = []
        self.neurons: dict[str, Neuron] = {}
        self.notes: dict[str, str] = {}
        self.ranks: Any = None  # process group of the data parallel model around, if there is one
        self._step, self._order, self._closed = -1, 0, -1
        self._connecting = False
        self._looking = False
        self._postponed = False
        self.wake()

    def wake(self) -> None:
        """Go on to the optimizer step that the run has come to."""
        self.awake = self._due()

    def _due(self) -> bool:
        rhythm = self.run.rhythm
        return rhythm % self.every == 0 and not self.schedule.frozen(rhythm)

    def connect(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the neuron behind each layer inside ``module`` and hook it.

        Args:
            module: the model, or the part of it that the training loop calls.
            args: arguments of a forward call.
            kwargs: keyword arguments of it.
        """
        waiting = [source for source in self.sources if not source.connected]
        inside = {id(child) for child in nn.Module.modules(module)}
        if not any(id(source.layer) in inside for source in waiting):
            return
        self._connecting = self.run.quiet = True  # the trace calls layers and neurons as well
        try:
            with gathered_inside(module):
                graph = trace(module, args, example_kwargs=kwargs)
        except TraceError as error:
            for source in waiting:
                source.connected |= id(source.layer) in inside
            warnings.warn(
                f"EID is off, masks learn from the task alone: {error}",
                SpikeNMWarning,
                stacklevel=2,
            )
            return
        finally:
            self._connecting = self.run.quiet = False
        self.wire(module, graph)

    def postpone(self) -> None:
        """A transform or a tracer runs, whose tensors no trace can read: say so once."""
        if not self._postponed:
            self._postponed = True
            warnings.warn(
                "EID waits for a training forward outside of torch.func's transforms and of "
                "tracers, to see which neuron each layer drives; "
                "sparsify(model, example_inputs=...) shows it at once",
                SpikeNMWarning,
                stacklevel=2,
            )

    def wire(self, module: nn.Module, graph: SpikingGraph) -> None:
        """Hook the neurons that ``graph`` of ``module`` sees behind the watched layers.

        Layers are found by what they are, as their names may have changed since ``sparsify``.
        """
        names = {id(child): name for name, child in nn.Module.named_modules(module)}
        for source in self.sources:
            name = names.get(id(source.layer))
            if source.connected or name is None or name not in graph.layers:
                continue
            source.connected = True
            posts = graph.layers[name].post
            modules = [n for n in posts if not graph.neurons[n].functional]
            if not modules:
                what = "no neuron" if not posts else "a neuron inside a forward function"
                self.notes[source.name] = f"{what} behind it: no EID"
            for post in modules:
                source.posts.append(self._watched(post, module.get_submodule(post)))
            if modules:
                self.see(source)

    def first_look(self, source: Source) -> None:
        """Notice a layer that is called without any module around it."""
        source.layer.register_forward_pre_hook(FirstHook(self, source))

    def see(self, source: Source) -> None:
        """Look at what goes in and out of a layer."""
        source.layer.register_forward_hook(LayerHook(self, source))

    def _watched(self, name: str, module: nn.Module) -> Neuron:
        known = next((n for n in self.neurons.values() if n.module is module), None)
        if known is not None:
            return known
        neuron = self.neurons[name] = Neuron(name, module)
        spec = neuron_spec(module)
        state = () if spec is None else spec.state[:1]
        module.register_forward_pre_hook(NeuronHook(self, neuron, state), with_kwargs=True)
        return neuron

    @property
    def busy(self) -> bool:
        """Whether the library itself runs the model."""
        return self._connecting or self._looking

    @property
    def connected(self) -> bool:
        """Whether every layer knows what it drives."""
        return not self.needs_neuron or all(source.connected for source in self.sources)

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
            or self._connecting
            or not self._due()
            or is_captured()
            or not (compiled or torch.is_grad_enabled())
        ):
            return False
        if self._step != step:
            self.forget()
            self._step = step
        if self._looking:
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
        return self._step != self.run.step and bool(watched)

    def _waits_for(self, source: Source) -> bool:
        """Whether no call of a module has shown yet what a layer drives, and nobody said why."""
        return not source.connected and not self._postponed

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
                self._locate(source, neuron, spec, current)

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

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn of the neurons in ``module`` what a compiled graph cannot be asked.

        It is run as it is, once, before it is compiled: which neuron each layer drives, whether
        neurons step through time, and where in memory their inputs lie.  All is afterwards as
        it was before.

        Args:
            module: about to be compiled.
            args: arguments of a forward call.
            kwargs: keyword arguments of it.
        """
        with run_as_eager():
            if not self.connected:
                self.connect(module, args, kwargs)
            if any(self._unlocated(source) for source in self.sources):
                self._look_once(module, args, kwargs)

    def can_learn(self, module: nn.Module) -> bool:
        """Whether :meth:`look` at ``module`` would show anything that is not known yet."""
        waits = [s for s in self.sources if not s.connected or self._unlocated(s)]
        inside = {id(child) for child in nn.Module.modules(module)} if waits else set()
        return self.needs_neuron and any(id(source.layer) in inside for source in waits)

    def _unlocated(self, source: Source) -> bool:
        return bool(source.posts) and source.same_order is None and not source.frozen

    def _look_once(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, kept = self._step, [each.put_aside() for each in self._all()]
        self._step, self._looking, self.run.quiet = self.run.step, True, True
        try:
            with gathered_inside(module), preserved(module), torch.enable_grad():
                module(*tree_map(_leaf, args), **tree_map(_leaf, kwargs))
        except Exception as error:  # the user's code, called out of its context
            self.run.warn(
                "look",
                f"{type(module).__name__} could not be run before it was compiled "
                f"({type(error).__name__}: {error}): EID takes it that inputs of neurons lie in "
                "memory as the outputs of their layers do",
            )
        finally:
            self._step, self._looking, self.run.quiet = step, False, False
            for each, own in zip(self._all(), kept, strict=True):
                each.take_back(own)

    def _all(self) -> list[Source | Neuron]:
        return [*self.sources, *self.neurons.values()]

    def _locate(self, source: Source, neuron: Neuron, spec: NeuronSpec, current: Tensor) -> None:
        if source.same_order is None:
            source.same_order = _same_order(self, source, neuron, spec, current)
        if source.same_order or spec.step_mode != "multi":
            return
        slopes = slopes_of(neuron, spec, neuron.calls[-1:])
        outputs = [use.output for use in source.uses if use.output is not None]
        asked = len(outputs) == len(source.uses)
        if slopes is None or not asked or not all(y.requires_grad for y in (current, *outputs)):
            return
        try:
            back = self.gradients(current, slopes[0].to(current.dtype), outputs)
        except RuntimeError:  # a compiled graph; a norm whose weight FSDP has let go of
            return
        source.mapped = [
            torch.zeros_like(y) if g is None else g for y, g in zip(outputs, back, strict=True)
        ]

    def gradients(
        self, of: Tensor, grad: Tensor, wanted: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Gradients in the graph that stays there for the backward pass of a forward on its way.

        Args:
            of: what was computed, of any shape.
            grad: of the same shape.
            wanted: from which it was computed, of any shapes.
        """
        if any(weight.shard is not None for weight in self.run.weights):
            return gradients_without_hooks(of, grad, wanted)
        return torch.autograd.grad(of, wanted, grad, retain_graph=True, allow_unused=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": -1, "_order": 0, "ranks": None}


class Observed:
    """What is seen of one masked weight: a measure for :class:`~spikenm_fx.masks.eid.Guide`.

    Args:
        watch: of the model.
        layers: the layers that hold the weight, by name.
    """

    def __init__(self, watch: Watch, layers: Iterable[tuple[str, nn.Module]]) -> None:
        self.watch = watch
        self.sources = [Source(name, layer) for name, layer in layers]
        watch.sources += self.sources
        for source in self.sources if not watch.needs_neuron else ():
            watch.see(source)

    def close(self, step: int) -> None:
        """A backward pass has reached the weight: no further forward of the step is kept."""
        for source in self.sources:
            source.closed = step

    @property
    def sees(self) -> bool:
        """Whether there is anything that could be measured: a neuron behind the layer."""
        return not self.watch.needs_neuron or any(source.posts for source in self.sources)

    def measure(self) -> Tensor | None:
        """The credit that this step's forward passes left, without |W|; None where nothing did."""
        self.watch.close()
        one = self._eligibility if self.watch.needs_neuron else _root_rate
        found = [credit for source in self.sources if (credit := one(source)) is not None]
        for source in self.sources:
            source.forget()
        return torch.stack(found).sum(0) if found else None

    def _eligibility(self, source: Source) -> Tensor | None:
        for neuron in source.posts:
            neuron.catch_up()
        slopes = slopes_at(source) if source.uses and source.posts else None
        if slopes is None:
            return None
        sequences = sum(samples_seen(neuron) for neuron in source.posts[:1])
        credit = sum(
            correlate(source.layer, use.inputs, slope)
            for use, slope in zip(source.uses, slopes, strict=True)
        )
        assert isinstance(credit, Tensor)
        return credit / max(sequences, 1)


def _root_rate(source: Source) -> Tensor | None:
    if not source.uses:
        return None
    rates = [presynaptic_rate(source.layer, use.inputs) for use in source.uses]
    rate = torch.stack(rates).mean(0).sqrt()
    weight = source.layer._parameters["weight"]
    assert weight is not None
    return rate.expand(weight.shape)


def _leaf(value: Any) -> Any:
    """A tensor, of any shape, at which a graph begins; all else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _starts(module: nn.Module, spec: NeuronSpec, rest: tuple[Any, ...]) -> bool:
    """Whether the state is that of a new sequence: none, empty, or zero everywhere."""
    if spec.step_mode == "multi":
        return True
    own = [getattr(module, name, None) for name in spec.state[:1]]
    state = tree_leaves(rest) if rest else own
    tensors = [value for value in state if isinstance(value, Tensor)]
    return not any(bool(value.detach().any()) for value in tensors)


def _same_order(
    watch: Watch, source: Source, neuron: Neuron, spec: NeuronSpec, current: Tensor
) -> bool | None:
    """Ask the graph where three of the neuron's inputs come from; None while it cannot tell."""
    outputs = [use.output for use in source.uses if use.output is not None]
    if len(outputs) < len(source.uses) or not all(y.requires_grad for y in outputs):
        return None  # inside of a compiled graph, or without one
    total = sum(use.shape.numel() for use in source.uses)
    before = sum(call.current.numel() for call in neuron.calls[:-1])
    if spec.step_mode == "multi" and before + current.numel() != total and len(source.posts) == 1:
        return False  # pooled or cut on the way
    if len(source.posts) > 1 or not current.requires_grad or before + current.numel() > total:
        return None
    index = in_layer_order(
        torch.arange(current.numel(), device="cpu").view(current.shape), spec, len(source.uses)
    )
    places = index.tolist()
    for place in {int(share * current.numel()) for share in _PROBES}:
        one = torch.zeros(current.shape, dtype=current.dtype, device=current.device)
        one.view(-1)[place] = 1.0
        try:
            grads = watch.gradients(current, one, outputs)
        except RuntimeError:  # a compiled graph, an output that was overwritten
            return None
        flat = [
            torch.zeros(y.numel(), dtype=torch.float32, device=y.device)
            if g is None
            else g.flatten().float().abs()
            for y, g in zip(outputs, grads, strict=True)
        ]
        strongest = torch.cat(flat)
        if not bool(strongest.any()):
            return None
        if int(strongest.argmax()) != before + places.index(place):
            return False
    return True


def hook_neuron(watch: Watch, name: str, module: nn.Module) -> Neuron:
    """Keep what a neuron receives on refresh steps, without looking at any layer."""
    return watch._watched(name, module)


def watch_calls(model: nn.Module, watch: Watch) -> None:
    """Hook every module that contains a watched layer: the loop may call or compile any of them.

    Not where no neuron is behind any layer, nor where all modules without children are torch's own,
    among which there is none.

    Args:
        model: the sparsified model.
        watch: of it.
    """
    modules = list(nn.Module.modules(model))
    layers = {id(source.layer) for source in watch.sources}
    leaves = [m for m in modules if not m._modules and id(m) not in layers]
    if watch.connected:
        if not any(source.posts for source in watch.sources):
            return
    elif all(type(leaf).__module__.startswith("torch.nn.") for leaf in leaves):
        for source in watch.sources:
            source.connected = True
            watch.notes[source.name] = "no neuron behind it: no EID"
        return
    for source in watch.sources:
        if not source.connected:
            watch.first_look(source)
    for module in modules:
        inside = (id(child) for child in nn.Module.modules(module) if child is not module)
        if any(child in layers for child in inside):
            module.register_forward_pre_hook(CallHook(watch, module), with_kwargs=True)
