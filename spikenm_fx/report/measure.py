# SPDX-License-Identifier: Apache-2.0
"""Run a model over batches and count: the verb ``report``.

Hooks on the weight layers see every input as it is; nothing is estimated from rates.  The model is
returned to the state it was in.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from spikenm_fx._torch import tree_leaves, tree_map
from spikenm_fx.errors import ReportError, TraceError, no_module, some_of
from spikenm_fx.pattern import WeightLayer, is_weight_layer
from spikenm_fx.plan.plan import Plan
from spikenm_fx.report.axes import sample_axis
from spikenm_fx.report.data import LatencyReport, LayerReport, NeuronReport
from spikenm_fx.report.describe import describe
from spikenm_fx.report.energy import EnergyModel
from spikenm_fx.report.engine import is_engine, kernels_of, visible_twin
from spikenm_fx.report.latency import measure_latency
from spikenm_fx.report.masks import PES
from spikenm_fx.report.neurons import NeuronWatch
from spikenm_fx.report.raw import RawProducts
from spikenm_fx.report.synops import LayerCounter
from spikenm_fx.report.view import Report
from spikenm_fx.state import advice_if_sharded, preserved_in_eval, reset_to_rest
from spikenm_fx.trace import trace
from spikenm_fx.trace.analysis.products import signal_products
from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["report"]

Forward = Callable[[nn.Module, Any], Any]


def report(
    model: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    reset: Callable[[nn.Module], Any] | None = None,
    batch_dim: int | None = None,
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    plan: Plan | None = None,
    graph: SpikingGraph | None = None,
    energy: EnergyModel | None = None,
    pes: int = PES,
    latency: Mapping[str, nn.Module] | bool = False,
    repeats: int = 5,
) -> Report:
    """Measure density, firing, exact operations, energy and bytes of each weight layer.

    Works on dense, sparsified, folded and packed models alike.  The model runs in eval mode, from
    rest for each batch, and is afterwards as it was: state, buffers, mode, hooks, generators.

    Args:
        model: any module.
        batches: an iterable of batches, or one tensor.  Of a tuple ``(input, target, ...)`` the
            first item is the input; a dict is passed as keyword arguments.
        forward: how one batch runs; by default ``model(input)``.  A model that is called once per
            time step takes ``lambda model, x: [model(x) for _ in range(T)]``.
        reset: brings the model to rest between batches; by default each module's own reset.
        batch_dim: dimension of the input that runs over samples.  By default what the trace shows:
            1 where the model goes along the first one in time, ``[T, B, ...]``, else 0.
        reference: the dense model or its state dict, for the kept magnitude of folded weights.
        plan: what was decided, for each layer's action and reason.
        graph: a trace of the model, for the neurons that each layer drives; made here from one
            sample of the first batch where none is given.  A model that cannot be traced that way
            (a note says so) is read by its order of execution: the next neuron to run is taken,
            which misleads where branches run side by side.
        energy: picojoule per operation; 0.9 per AC and 4.6 per MAC by default.
        pes: processing elements behind the utilisation figure.
        latency: True to time ``model``, or models by name (e.g. dense, folded, packed) that take
            the same batch.
        repeats: timed forwards per model, after one to warm up.

    Raises:
        ReportError: if there is no batch or sample, no weight layer, a batch holds NaN, the model
            cannot run one, or a number is out of its range.
    """
    if not isinstance(model, nn.Module):
        raise ReportError(no_module("report", model))
    if pes < 1 or (latency and repeats < 1):
        raise ReportError(f"pes={pes}, repeats={repeats}: both must be 1 or more")
    name = type(model).__name__
    original, kernels = model, {}
    if is_engine(model):
        kernels, model = kernels_of(model), visible_twin(model)
    layers: dict[str, WeightLayer] = _weight_layers(model)
    constants = energy or EnergyModel()
    decisions = {e.name: (e.action, e.reason) for e in plan.layers} if plan is not None else {}
    chosen = forward or _default_forward

    def run(model: nn.Module, batch: Any) -> Any:
        return chosen(model, _copied(batch))

    rest = reset or reset_to_rest
    first, given = _peeked(batches)
    if graph is None:
        graph = _traced(model, _to_device(first, model), batch_dim)
    found = batch_dim is None and forward is None
    batch_dim = batch_dim if batch_dim is not None else sample_axis(graph) if found else 0
    samples = count = 0
    with preserved_in_eval(model):
        counters = {
            name: LayerCounter(
                layer, (layer.weight.detach() != 0).cpu(), scale=_scale(graph, name), pes=pes
            )
            for name, layer in layers.items()
        }
        neurons = NeuronWatch.of_model(model)
        scales = {raw: _scale(graph, raw) for raw in graph.layers} if graph is not None else {}
        products = RawProducts(model, layers, counters, neurons.layer_ran, scales, pes)
        with _watching(layers, counters, neurons):
            for batch in given:
                rest(model)
                batch = _to_device(batch, model)
                _refuse_non_finite(batch, count)
                with products.attached() if _has_raw(graph) else contextlib.nullcontext():
                    _run(run, model, batch, count)
                samples += _samples(batch, batch_dim)
                count += 1
        if not samples:
            raise ReportError("the batches hold no sample: nothing could be measured")
        watched = [(name, layer, counters[name]) for name, layer in layers.items()]
        watched += [(name, counter.layer, counter) for name, counter in products.raw.items()]
        if not watched:
            raise ReportError(_nothing_multiplied(model))
        described = [
            describe(
                name,
                layer,
                counter,
                rate_out=neurons.rate_after(name, *_driven(graph, name)),
                dense=_dense_weight(name, layer, reference),
                decision=decisions.get(name),
                energy=constants,
                pes=pes,
            )
            for name, layer, counter in watched
        ]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        described = [
            products.describe(one.name, parameters[one.name], one)
            if one.name in products.raw
            else one
            for one in described
        ]
    variants = {"model": original} if latency is True else dict(latency or {})
    return Report(
        model=name,
        layers=tuple(
            replace(layer, note=kernels[layer.name]) if layer.name in kernels else layer
            for layer in described
        ),
        samples=samples,
        batches=count,
        energy=constants,
        neurons=neurons.reports(),
        latency=_latency(variants, _to_device(first, model), run, rest, repeats),
        pes=pes,
        notes=(
            *(_ALONG_TIME,) * (found and batch_dim == 1),
            *_notes(described, neurons.reports(), graph, products.uncounted),
        ),
    )


_ALONG_TIME = (
    "the model goes along the first axis of its input in time, so samples are counted along the "
    "second; batch_dim= says otherwise"
)


def _weight_layers(model: nn.Module) -> dict[str, WeightLayer]:
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Module) and is_weight_layer(module)
    }
    if not layers and not any(p.dim() >= 2 for p in model.parameters()):
        raise ReportError(_nothing_multiplied(model))
    return layers  # type: ignore[return-value]


def _nothing_multiplied(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no Linear or Conv layer, and no raw parameter was seen "
        "multiplied with data; there is nothing to report"
    )


def _has_raw(graph: SpikingGraph | None) -> bool:
    """Whether something may be multiplied that no call of a layer shows."""
    if graph is None:
        return True
    return any(r.kind == "functional" or r.undecided for r in graph.layers.values())


def _scale(graph: SpikingGraph | None, name: str) -> float:
    """What the spikes that a layer sees are multiplied with; 1 where nothing is known."""
    record = graph.record(name) if graph is not None else None
    signal = record.input_signal if record is not None else None
    return signal.step if signal is not None and signal.is_multiple else 1.0


def _batches(batches: Any) -> Iterator[Any]:
    if isinstance(batches, Tensor):
        return iter([batches])
    if isinstance(batches, Iterable) and not isinstance(batches, str | bytes | dict):
        return iter(batches)
    raise ReportError(
        f"batches is a {type(batches).__name__}; pass a tensor or an iterable of batches"
    )


def _peeked(batches: Any) -> tuple[Any, Iterator[Any]]:
    """The first batch, and all of them from the first on."""
    given = _batches(batches)
    for first in given:
        return first, itertools.chain([first], given)
    raise ReportError("no batch was given; pass a tensor or an iterable of batches")


def _traced(model: nn.Module, batch: Any, batch_dim: int | None) -> SpikingGraph | None:
    """Who drives whom, from one sample; None where the model alone cannot run it.

    Without ``batch_dim`` two elements of the first axis are taken: samples, or steps.
    """
    axis, most = (0, 2) if batch_dim is None else (batch_dim, 1)

    def one(item: Any) -> Any:
        fits = isinstance(item, Tensor) and item.dim() > axis
        return item.narrow(axis, 0, min(most, item.shape[axis])) if fits else item

    try:
        if isinstance(batch, dict):
            return trace(model, example_kwargs=tree_map(one, batch))
        return trace(model, one(_input_of(batch)))
    except TraceError:
        return None


def _latency(
    variants: Mapping[str, nn.Module], first: Any, run: Forward, rest: Any, repeats: int
) -> LatencyReport | None:
    return measure_latency(variants, first, run, rest, repeats) if variants else None


def _input_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, list | tuple) and batch else batch


def _default_forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(_input_of(batch))


def _run(run: Forward, model: nn.Module, batch: Any, index: int) -> None:
    try:
        run(model, batch)
    except Exception as error:
        inputs = _input_of(batch)
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ReportError(
            f"batch {index} (input {shape}) does not run through {type(model).__name__}: "
            f"{type(error).__name__}: {error}\n  a model that needs another call, or a loop over "
            "time, takes forward=lambda model, batch: ..." + advice_if_sharded(model)
        ) from error


def _refuse_non_finite(batch: Any, index: int) -> None:
    for item in tree_leaves(batch):
        if isinstance(item, Tensor) and item.is_floating_point() and not item.isfinite().all():
            raise ReportError(f"batch {index} holds NaN or infinity; give finite values")


def _copied(batch: Any) -> Any:
    """The same tensors in memory of their own: some models reshape their input in place."""
    return tree_map(lambda item: item.clone() if isinstance(item, Tensor) else item, batch)


def _to_device(batch: Any, model: nn.Module) -> Any:
    parameter = next(model.parameters(), None)
    if parameter is None:
        return batch
    device = parameter.device
    return tree_map(lambda item: item.to(device) if isinstance(item, Tensor) else item, batch)


def _samples(batch: Any, batch_dim: int) -> int:
    if isinstance(batch, list | tuple) and len(batch) > 1:
        target = batch[1]
        if isinstance(target, Tensor) and target.dim() >= 1:
            return target.shape[0]
    inputs = next(iter(batch.values())) if isinstance(batch, dict) else _input_of(batch)
    if not isinstance(inputs, Tensor) or not inputs.dim():
        return 1
    if not -inputs.dim() <= batch_dim < inputs.dim():
        raise ReportError(
            f"batch_dim={batch_dim}, but the input has shape {tuple(inputs.shape)}: name the "
            "dimension that runs over samples"
        )
    return inputs.shape[batch_dim]


def _driven(graph: SpikingGraph | None, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The neurons a layer drives, and all that the trace knows."""
    if graph is None:
        return (), ()
    record = graph.layers.get(name)
    return record.post if record is not None else (), tuple(graph.neurons)


def _dense_weight(
    name: str, layer: nn.Module, reference: nn.Module | Mapping[str, Tensor] | None
) -> Tensor | None:
    """The weight before masking: the layer's own while it is masked, else the reference's."""
    own = getattr(layer, "weight_dense", None)
    if isinstance(own, Tensor):
        return own.detach()
    if reference is None:
        return None
    state = reference.state_dict() if isinstance(reference, nn.Module) else reference
    found = state.get(f"{name}.weight" if name else "weight")
    return found.detach() if isinstance(found, Tensor) else None


@contextlib.contextmanager
def _watching(
    layers: Mapping[str, WeightLayer],
    counters: Mapping[str, LayerCounter],
    neurons: NeuronWatch,
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = _layer_hook(name, counters[name], neurons)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(neurons.attached())
        yield


def _layer_hook(
    name: str, counter: LayerCounter, neurons: NeuronWatch
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        outputs = output[0] if isinstance(output, tuple) else output
        if isinstance(inputs, Tensor) and isinstance(outputs, Tensor):
            counter.add(inputs, outputs)
        neurons.layer_ran(name)

    return hook


def _steps_once(graph: SpikingGraph) -> bool:
    """Whether all neurons keep a state and took one step of time alone."""
    specs = [(n.calls, n.spec) for n in graph.neurons.values()]
    return bool(specs) and all(c == 1 and s.step_mode == "single" and s.state for c, s in specs)


def _notes(
    layers: list[LayerReport],
    neurons: tuple[NeuronReport, ...],
    graph: SpikingGraph | None,
    uncounted: list[str],
) -> tuple[str, ...]:
    never = [layer.name for layer in layers if not layer.calls]
    silent = [neuron.name for neuron in neurons if not neuron.rate]
    notes = []
    if never:
        notes.append(
            f"{len(never)} layers never ran as modules and count as no operations: {some_of(never)}"
        )
    if silent:
        notes.append(
            f"{len(silent)} of {len(neurons)} neuron layers never fired ({some_of(silent)}): what "
            "follows them counts no SynOps. An untrained network, or batch norms that saw no data?"
        )
    if silent and graph is not None and _steps_once(graph):
        notes.append(
            "each neuron ran one time step per forward: if the model is called once for each step, "
            "give forward=lambda model, x: [model(x) for _ in range(T)]"
        )
    counts = [layer.name for layer in layers if layer.signal == "integer"]
    if counts:
        notes.append(
            f"{len(counts)} layers see counts of spikes, of which k counts as k additions: "
            f"{some_of(counts)}"
        )
    zeros = [
        f"{layer.name} {1 - layer.input_density:.0%}"
        for layer in layers
        if layer.signal == "analog" and layer.input_density is not None and layer.input_density < 1
    ]
    if zeros:
        notes.append(
            "MACs are of all analog inputs, zeros included, whose share is: " + some_of(zeros)
        )
    products = signal_products(graph.operations) if graph and graph.operations else []
    if products:
        names = ", ".join(dict.fromkeys(name for name, _ in products))
        times = f"{sum(number for _, number in products):,} multiplications"
        notes.append(
            f"products of two signals, as attention's are, hold no weight and count in no row: "
            f"{times} in the forward that was traced ({names})"
        )
    if graph is None and neurons:
        notes.append(
            "the model could not be traced on one sample: 'rate out' is that of the next neuron to "
            "run; pass graph=trace(model, inputs) to be sure"
        )
    odd = [layer.name for layer in layers if layer.not_finite]
    if odd:
        notes.append(
            f"{len(odd)} layers hold weights that are NaN or infinite, which count as non-zero: "
            f"{some_of(odd)}"
        )
    if uncounted:
        notes.append(
            f"{len(uncounted)} weights are multiplied outside of any Linear or Conv module in a "
            f"way that is not counted: {some_of(uncounted)}"
        )
    return tuple(notes)
