# SPDX-License-Identifier: Apache-2.0
"""The verb: read a model, change nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from spikenm_fx._torch import behind_compiled, is_scripted, tree_flatten
from spikenm_fx.errors import TraceError, no_module
from spikenm_fx.state import advice_if_sharded, detach_state, preserved, takes_no_arguments
from spikenm_fx.trace.execution.leaves import LeafRule, Limits, TraceLimitReached
from spikenm_fx.trace.execution.record import Trace
from spikenm_fx.trace.execution.tracer import Failure, UnknownTensor, ValueTracer
from spikenm_fx.trace.execution.unseen import Unseen
from spikenm_fx.trace.execution.values import is_matrix, is_scripted_block
from spikenm_fx.trace.graph import Note, Route, SpikingGraph, with_prefix
from spikenm_fx.trace.kept import Seen, keep, kept, look_at
from spikenm_fx.trace.neurons.find import find_neurons, registered_neurons
from spikenm_fx.trace.neurons.spec import NeuronSpec

__all__ = ["trace"]

_ATTEMPTS = 24
"""How many classes of submodules may be found untraceable, one per attempt."""


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    measure: bool = False,
    inside: bool = False,
) -> SpikingGraph:
    """Read ``model``: its layers and neurons, who feeds whom, and what flows between them.

    The model is run on the examples in eval mode from a reset state, and afterwards is as before:
    parameters, buffers, neuron state, gradients, training flags, hooks, random generators.  The
    user's own forward hooks are not run.

    The last reading is kept while its model lives: ``plan``, ``sparsify`` and the other verbs read
    the same model on the same examples once.  What the forward can reach must be as it was for
    that (:mod:`spikenm_fx.trace.kept`); state that changes what a forward does and that no module,
    class, closure or plain global holds is not seen: ``trace(model, x, limits=Limits())`` reads
    anew.

    It takes at most three eager forwards and a second of processor time, and at most twice the
    memory of a forward and 16 KiB: torch's random generator alone has a state of 5 KiB, kept for
    the model and once more while a neuron of unknown rule is driven hard to see what it emits.

    Args:
        model: any module; DataParallel and compiled wrappers are looked through.
        example_inputs: a tensor, or a tuple of positional arguments, as for ``model(...)``.  None
            reads what the code tells without running it.
        example_kwargs: keyword arguments of the forward.
        limits: bounds on time and size for each attempt.
        measure: also look at the example's values on every edge (edge attribute ``measured``), to
            hold the inferred signals against them; slower.
        inside: look into neurons whose rule is not known, too: what they compute stands in the
            graph, operation by operation, and they are no neurons in it.

    Returns:
        The graph; its ``route`` says how it was obtained and its ``notes`` what was unusual.

    Raises:
        TraceError: if the model's own forward raises on the examples, or cannot be read at all.
    """
    from spikenm_fx.trace.analysis.build import build  # networkx: many need a graph's type alone

    if not isinstance(model, nn.Module):
        raise TraceError(no_module("trace", model))
    inner, prefix, notes = _unwrap(model)
    _refuse_unreadable(inner)
    args, kwargs = _arguments(example_inputs, example_kwargs)
    plainly = bool(args or kwargs) and limits is None and not (measure or inside)
    if plainly and (graph := kept(model, _seen(model, args, kwargs))) is not None:
        return graph
    neurons = find_neurons(inner)
    with _quiet(inner, notes), preserved(inner) as restore:
        if not args and not kwargs:
            result = _symbolic(inner, _known(neurons) if inside else neurons)
        else:
            _check_devices(inner, args, kwargs)
            limits = limits or Limits()
            result = _attempts(inner, neurons, args, kwargs, limits, restore, measure, inside)
            scripted = _scripted_notes(inner)
            result.notes += scripted
            if scripted and result.route == "fx":
                result.route = "fx+execution"
        result.notes[:0] = notes
        graph = build(result)
        graph = with_prefix(graph, prefix) if prefix else graph
    if plainly:
        keep(model, _seen(model, args, kwargs), graph)
    return graph


def _seen(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen | None:
    return look_at(model, args, kwargs, registered_neurons())


def _attempts(
    model: nn.Module,
    neurons: Mapping[str, NeuronSpec],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    limits: Limits,
    restore: Callable[[], None],
    measure: bool,
    inside: bool,
) -> Trace:
    """Trace; make what fails opaque and try again; record the execution of the whole at last."""
    every = neurons  # all of them start at rest
    neurons = _known(neurons) if inside else neurons
    modules = {m for name, m in nn.Module.named_modules(model) if name in neurons}
    # what a neuron emits is measured, under strong drive too, unless its whole rule is known
    unknown = {model.get_submodule(n) for n, s in neurons.items() if not s.exact}
    opaque: set[type[nn.Module]] = set()
    notes: list[Note] = []
    unseen: Unseen | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            restore()
        _start_fresh(model, every)
        leaf = LeafRule(modules, opaque, unknown)
        unseen = None if unseen is None else Unseen()
        tracer = ValueTracer(model, leaf, limits.again(), measure=measure, unseen=unseen)
        try:
            graph = tracer.run(args, kwargs)
            route: Route = "fx+execution" if opaque else "fx"
            return _result(tracer, graph, neurons, route, notes)
        except TraceLimitReached as error:
            raise _over_limit(error) from error
        except Failure as failure:
            if unseen is None and isinstance(failure.cause, UnknownTensor):
                unseen = Unseen()  # again, and looking whether it is a constant
                continue
            notes.append(_fallback_note(failure))
            failed = failure.module
            if failed is None or failed is model or type(failed) in opaque:
                break
            opaque.add(type(failed))
    restore()
    _start_fresh(model, every)
    tracer = ValueTracer(model, LeafRule(modules, set(), unknown), limits.again(), measure=measure)
    try:
        graph = tracer.run_recorded(args, kwargs)
    except TraceLimitReached as error:
        raise _over_limit(error) from error
    except Failure as failure:
        raise TraceError(
            f"{type(model).__name__}: its forward raised {type(failure.cause).__name__}: "
            f"{failure.cause} at {failure.line}"
            + (f" (in {failure.name})" if failure.name else "")
            + f"; given: {_shapes(args, kwargs)}. model(*example_inputs) must run as it stands. "
            "The model was left as it was." + advice_if_sharded(model)
        ) from failure.cause
    return _result(tracer, graph, neurons, "execution", notes)


def _known(neurons: Mapping[str, NeuronSpec]) -> dict[str, NeuronSpec]:
    return {name: spec for name, spec in neurons.items() if spec.exact}


def _result(
    tracer: ValueTracer,
    graph: fx.Graph,
    neurons: Mapping[str, NeuronSpec],
    route: Route,
    notes: list[Note],
) -> Trace:
    inner, shown, computed = tracer.inner, tracer.shown_states, tracer.computed
    return Trace(tracer.model, graph, neurons, route, notes, inner, shown, computed)


def _fallback_note(failure: Failure) -> Note:
    return Note(
        failure.name,
        f"could not be followed ({type(failure.cause).__name__}: "
        f"{str(failure.cause).splitlines()[0] if str(failure.cause) else ''}; {failure.line}); "
        "recorded from its execution instead",
    )


def _scripted_notes(model: nn.Module) -> list[Note]:
    """Outermost scripted parts with weights: read from their execution, never masked."""
    notes: dict[str, Note] = {}
    for name, module in nn.Module.named_modules(model):
        if is_scripted_block(module) and not any(name.startswith(f"{n}.") for n in notes):
            matrices = [n for n, p in module.named_parameters() if is_matrix(p)]
            notes[name] = Note(
                name,
                f"scripted by torch.jit: its weights ({', '.join(matrices)}) were read from its "
                "execution and cannot be made sparse; build the model with PYTORCH_JIT=0 for that",
            )
    return list(notes.values())


def _over_limit(error: TraceLimitReached) -> TraceError:
    return TraceError(
        f"the trace took {error}; pass smaller example inputs (fewer time steps, one sample) or "
        "larger limits=Limits(seconds=..., nodes=...)"
    )


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    flat = tree_flatten((args, kwargs))[0]
    shown = [
        f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
        if isinstance(x, Tensor)
        else repr(x)[:40]
        for x in flat
    ]
    return ", ".join(shown)


# -- without examples -----------------------------------------------------------------------------


class _SymbolicTracer(fx.Tracer):
    """Plain fx with our leaves: no values, so branches on data stop it."""

    def __init__(self, leaf: LeafRule) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.leaf = leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = ""
        if node.op == "call_module":
            node.meta["module"] = self.root.get_submodule(str(node.target))
        return node


def _symbolic(model: nn.Module, neurons: Mapping[str, NeuronSpec]) -> Trace:
    modules = {m for name, m in nn.Module.named_modules(model) if name in neurons}
    try:
        with behind_compiled():
            graph = _SymbolicTracer(LeafRule(modules, set())).trace(model)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        note = Note(
            "",
            f"not readable without example inputs ({type(error).__name__}: {text}); layers and "
            "neurons are from the module tree, pass example_inputs for the rest",
        )
        return Trace(model, None, neurons, "modules", [note])
    return Trace(model, graph, neurons, "symbolic")


# -- preparing a model ----------------------------------------------------------------------------


def _arguments(
    example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(example_kwargs or {})
    if example_inputs is None:
        return (), kwargs
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return example_inputs, kwargs
    return (example_inputs,), kwargs


def _unwrap(model: nn.Module) -> tuple[nn.Module, str, list[Note]]:
    """Look through wrappers that only forward to one module; names keep the wrapper's prefix."""
    notes: list[Note] = []
    prefix = ""
    while True:
        wrapped = (
            "_orig_mod"
            if "_orig_mod" in model._modules
            else "module"
            if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
            else None
        )
        if wrapped is None:
            return model, prefix, notes
        notes.append(Note(prefix.rstrip("."), f"looked through {type(model).__name__}"))
        prefix += f"{wrapped}."
        model = getattr(model, wrapped)


def _refuse_unreadable(model: nn.Module) -> None:
    if is_scripted(model):
        raise TraceError(
            f"{type(model).__name__}: a scripted model hides its layers and their calls; "
            "trace the original module, and script afterwards"
        )
    lazy = [
        name
        for name, p in nn.Module.named_parameters(model)
        if isinstance(p, nn.parameter.UninitializedParameter)
    ]
    if lazy:
        raise TraceError(
            f"{lazy[0]} and {len(lazy) - 1} more parameters are uninitialised: run one forward "
            "of the lazy model first, so that its shapes are known"
        )


def _check_devices(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    present = {t.device.type for t in nn.Module.parameters(model)}
    given = {t.device.type for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
    if present and given and not present & given:
        raise TraceError(
            f"the model's parameters are on {', '.join(sorted(present))}, the example inputs on "
            f"{', '.join(sorted(given))}; move one of them"
        )


def _start_fresh(model: nn.Module, neurons: Mapping[str, NeuronSpec]) -> None:
    """Forget state left from before: its shape need not fit the examples."""
    detach_state(model)
    for name, spec in neurons.items():
        module = model.get_submodule(name)
        for part in nn.Module.modules(module):
            call = getattr(part, spec.reset_call or "", None)
            if callable(call) and takes_no_arguments(call):
                with contextlib.suppress(Exception):
                    call()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextlib.contextmanager
def _quiet(model: nn.Module, notes: list[Note]) -> Iterator[None]:
    """Eval mode, and without the user's hooks: they would record our proxies as their data."""
    flags = [(m, m.training) for m in nn.Module.modules(model)]
    emptied: list[tuple[dict[Any, Any], list[tuple[Any, Any]]]] = []
    for module, _ in flags:
        if not is_scripted(module):
            module.__dict__["training"] = False
            for attribute in _HOOKS:
                hooks = getattr(module, attribute)
                if any(not _is_torchs(hook) for hook in hooks.values()):
                    emptied.append((hooks, list(hooks.items())))
    for hooks, items in emptied:
        hooks.clear()
        hooks.update({key: hook for key, hook in items if _is_torchs(hook)})
    if emptied:
        notes.append(Note("", f"forward hooks of {len(emptied)} modules were not run"))
    try:
        yield
    finally:
        for module, training in flags:
            if not is_scripted(module):
                module.__dict__["training"] = training
        for hooks, items in emptied:
            hooks.clear()
            hooks.update(items)


def _is_torchs(hook: Any) -> bool:
    """weight_norm and spectral_norm compute the weight in a hook: those must run."""
    package = getattr(hook, "__module__", None) or type(hook).__module__
    return str(package).startswith("torch.nn.utils")
