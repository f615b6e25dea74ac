# SPDX-License-Identifier: Apache-2.0
"""Which neuron each watched layer drives, and the hooks that see both.

It comes from :mod:`spikenm_fx.trace`, with the user's examples, or on the first training forward of
the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from spikenm_fx.errors import SpikeNMWarning, TraceError
from spikenm_fx.masks.eid.forward_hooks import CallHook, FirstHook, LayerHook, NeuronHook
from spikenm_fx.masks.eid.slopes import Neuron, Source
from spikenm_fx.masks.gather import gathered_inside
from spikenm_fx.trace import SpikingGraph, neuron_spec, trace

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.watch import Watch

__all__ = ["connect", "hook_layer", "hook_neuron", "postpone", "watch_calls", "wire"]


def connect(
    watch: Watch, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Find the neuron behind each layer inside ``module`` and hook it.

    Args:
        watch: of the model.
        module: the model, or the part of it that the training loop calls.
        args: arguments of a forward call.
        kwargs: keyword arguments of it.
    """
    waiting = [source for source in watch.sources if not source.connected]
    inside = {id(child) for child in nn.Module.modules(module)}
    if not any(id(source.layer) in inside for source in waiting):
        return
    watch.connecting = watch.run.quiet = True  # the trace calls layers and neurons as well
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
        watch.connecting = watch.run.quiet = False
    wire(watch, module, graph)


def postpone(watch: Watch) -> None:
    """A transform or a tracer runs, whose tensors no trace can read: say so once."""
    if not watch.postponed:
        watch.postponed = True
        warnings.warn(
            "EID waits for a training forward outside of torch.func's transforms and of "
            "tracers, to see which neuron each layer drives; "
            "sparsify(model, example_inputs=...) shows it at once",
            SpikeNMWarning,
            stacklevel=2,
        )


def wire(watch: Watch, module: nn.Module, graph: SpikingGraph) -> None:
    """Hook the neurons that ``graph`` of ``module`` sees behind the watched layers.

    Layers are found by what they are, as their names may have changed since ``sparsify``.
    """
    names = {id(child): name for name, child in nn.Module.named_modules(module)}
    for source in watch.sources:
        name = names.get(id(source.layer))
        if source.connected or name is None or name not in graph.layers:
            continue
        source.connected = True
        posts = graph.layers[name].post
        modules = [n for n in posts if not graph.neurons[n].functional]
        if not modules:
            what = "no neuron" if not posts else "a neuron inside a forward function"
            watch.notes[source.name] = f"{what} behind it: no EID"
        for post in modules:
            source.posts.append(hook_neuron(watch, post, module.get_submodule(post)))
        if modules:
            hook_layer(watch, source)


def hook_layer(watch: Watch, source: Source) -> None:
    """Look at what goes in and out of a layer."""
    source.layer.register_forward_hook(LayerHook(watch, source))


def hook_neuron(watch: Watch, name: str, module: nn.Module) -> Neuron:
    """Keep what a neuron receives on refresh steps, without looking at any layer."""
    known = next((n for n in watch.neurons.values() if n.module is module), None)
    if known is not None:
        return known
    neuron = watch.neurons[name] = Neuron(name, module)
    spec = neuron_spec(module)
    state = () if spec is None else spec.state[:1]
    module.register_forward_pre_hook(NeuronHook(watch, neuron, state), with_kwargs=True)
    return neuron


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
            source.layer.register_forward_pre_hook(FirstHook(watch, source))
    for module in modules:
        inside = (id(child) for child in nn.Module.modules(module) if child is not module)
        if any(child in layers for child in inside):
            module.register_forward_pre_hook(CallHook(watch, module), with_kwargs=True)
