# SPDX-License-Identifier: Apache-2.0
"""The value-carrying tracer: ``torch.fx`` whose proxies *are* the example's values.

A proxy is a tensor with a node attached.  Each torch function is computed and recorded, so shapes,
``len``, ``bool``, iteration and branches on data are answered by the real values, and no C++ code
can be handed something that only pretends to be a tensor.  What comes out is a record to read,
never a program to run: batch size and T are baked in.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from spikenm_fx._torch import (
    DisableTorchFunction,
    behind_compiled,
    call_module_untraced,
    disable_current_modes,
    disable_torch_dispatch,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.state import preserved, reading
from spikenm_fx.trace.execution.bound import standing_in_for_bound_applies
from spikenm_fx.trace.execution.calls import (
    COMPARING,
    OF_SHAPE,
    PLAIN,
    call_site,
    label,
    tensors_held_by,
    written_argument,
)
from spikenm_fx.trace.execution.computed import has_own_forward, run_and_compare
from spikenm_fx.trace.execution.intercept import watch_applies
from spikenm_fx.trace.execution.leaves import LeafRule, Limits, TraceLimitReached
from spikenm_fx.trace.execution.recorder import Recorder
from spikenm_fx.trace.execution.repeats import Operation, Repeats, place_of_call
from spikenm_fx.trace.execution.template import template_of
from spikenm_fx.trace.execution.traced import Traced, Unwrapped, as_traced, holds_tensors, rebuild
from spikenm_fx.trace.execution.unseen import HANDING_OUT, Unseen
from spikenm_fx.trace.execution.values import (
    InnerCall,
    Measured,
    SurrogateCall,
    ValueInfo,
    describe,
    is_like,
    is_scripted_block,
    kind_of_values,
    user_line,
    widen,
    worst_of,
    write_view,
)

__all__ = ["Failure", "UnknownTensor", "ValueTracer"]


_TRACING = threading.RLock()
"""fx exchanges ``nn.Module.__call__`` while it traces: one trace at a time, nested ones allowed."""

_DETACHING = frozenset({Tensor.detach_, torch.detach_})
# what returns its argument where that is already so, and writes nothing
_AS_IT_WAS = frozenset({
    *(Tensor.contiguous, Tensor.to, Tensor.type, Tensor.type_as, Tensor.cpu, Tensor.cuda),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.requires_grad_),
})  # fmt: skip

_innermost = threading.local()
"""The tracer that this thread runs; one around it records nothing meanwhile."""


class Untraceable(NotImplementedError):
    """Something happens that this tracer cannot see; the execution trace can."""


class UnknownTensor(Untraceable):
    """A tensor turns up that no recorded operation made."""


class Failure(Exception):
    """The tracer could not follow ``module``; ``cause`` says why and ``line`` where."""

    def __init__(self, module: nn.Module | None, name: str, line: str, cause: Exception) -> None:
        super().__init__(f"{name or 'the model'}: {type(cause).__name__}: {cause} ({line})")
        self.module, self.name, self.line, self.cause = module, name, line, cause


class _Recording(TorchFunctionMode):
    """Show every torch function of this thread to the tracer."""

    def __init__(self, tracer: ValueTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = self.tracer
        repeats = tracer.repeats
        aside = tracer.computing or tracer.recorder is not None
        expected = None if repeats is None or aside else repeats.expected
        # nearly all of a long sequence goes through the next few lines
        if expected is not None and expected.of_torch and expected.fits(func, args, kwargs):
            with disable_torch_dispatch(), DisableTorchFunction():
                value = func(*args, **kwargs) if kwargs else func(*args)
                taken = expected.take(value, args)
            if taken is not None:
                assert repeats is not None
                repeats.skip()
                return taken if tracer.unseen is None else tracer.noted(taken)
        return tracer.on_function(func, args, kwargs or {})


class ValueTracer(fx.Tracer):
    """Trace one call of a model on example inputs.

    Args:
        model: the model; the caller preserves its state.
        leaf: which modules are single nodes.
        limits: when to give up.
        measure: look at the values of every node, not only of inputs and neurons.
        unseen: watches what is computed where this tracer does not see; slower.
    """

    def __init__(
        self,
        model: nn.Module,
        leaf: LeafRule,
        limits: Limits,
        *,
        measure: bool = False,
        unseen: Unseen | None = None,
    ) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.model, self.leaf, self.limits, self.measure = model, leaf, limits, measure
        self.unseen = unseen
        self.inner: dict[str, InnerCall] = {}
        self.shown_states: set[str] = set()
        self.computing = False
        self.recorder: Recorder | None = None
        self._thread = threading.get_ident()
        self._whole = False
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._names = {m: n for n, m in nn.Module.named_modules(model)}
        tensors = (*nn.Module.named_parameters(model), *nn.Module.named_buffers(model))
        self._tensor_names = {id(t): n for n, t in tensors}
        self._known = tensors_held_by(model)
        self._handed_out: dict[int, Tensor] = {}  # by id of the parameter
        self._stands_for: dict[int, Tensor] = {}  # parameters, by id of what was handed out
        self._constants: dict[int, tuple[Tensor, fx.Node]] = {}
        self._steps: dict[SurrogateCall, bool] = {}
        self.computed: dict[str, str] = {}
        self._layers: set[nn.Module] = set()
        self._probed: dict[nn.Module, Measured | None] = {}
        self._scope: list[nn.Module] = []
        self._failed_in: nn.Module | None = None
        self._count = 0
        self._probing = False
        # values of all steps are asked for: then each is recorded
        self.repeats = None if measure else Repeats()
        self._operation: Operation | None = None  # being recorded
        self._repeated: Iterator[fx.Node] | None = None  # what stands for it instead

    # -- running ----------------------------------------------------------------------------------

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
        """Trace ``model(*args, **kwargs)``.

        Raises:
            Failure: where the model cannot be followed.
            TraceLimitReached: past a limit.
        """
        self._inputs = (args, kwargs)
        return self._guarded()

    def run_recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
        """The same from one real execution, without following any Python.

        Raises:
            Failure: where the model itself raises.
            TraceLimitReached: past a limit.
        """
        self._inputs, self._whole = (args, kwargs), True
        return self._guarded()

    def _guarded(self) -> fx.Graph:
        around: ValueTracer | None = getattr(_innermost, "tracer", None)
        unseen = contextlib.nullcontext() if around is None else around._aside()
        with _TRACING, torch.no_grad(), reading(self._read), unseen, behind_compiled():
            try:
                _innermost.tracer = self
                return self.trace(self.model)
            except TraceLimitReached:
                raise
            except Exception as error:
                failed = self._failed_in
                name = self._names.get(failed, "") if failed is not None else ""
                raise Failure(failed, name, user_line(error), error) from error
            finally:
                _innermost.tracer = around

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder per tensor of the example, however it is nested in the arguments."""
        flat, layout = tree_flatten(self._inputs)
        inputs = []
        for index, value in enumerate(flat):
            if isinstance(value, Tensor):
                node = self.create_node("placeholder", f"input_{index}", (), {})
                node.meta["value"] = describe(value, measure=True)
                # models write into their input
                value = self.noted(as_traced(value.clone(), node))
            inputs.append(value)
        args, kwargs = tree_unflatten(inputs, layout)

        def forward(*_: Any) -> Any:
            if self._whole:
                out = self._run_opaque(self.model.forward, args, kwargs)
            else:
                bound = standing_in_for_bound_applies(self._followed(self.model))
                unseen = self.unseen or contextlib.nullcontext()
                with bound, unseen, watch_applies(self._on_apply), _Recording(self):
                    out = self.model.forward(*args, **kwargs)
                    out = list(out) if inspect.isgenerator(out) else out
            flat = tree_flatten(out)[0]
            self._note_states(flat)
            return tuple(t for t in flat if isinstance(t, Traced))

        return forward, []

    def _followed(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules whose Python is followed."""
        if not self.leaf(module) and type(module) not in self.leaf.opaque:
            yield module
            for child in module._modules.values():
                if child is not None:
                    yield from self._followed(child)

    def _note_states(self, outputs: list[Any]) -> None:
        """Tensors that leave the model but were never seen: state that a module holds."""
        unseen = {id(t) for t in outputs if isinstance(t, Tensor) and not isinstance(t, Traced)}
        for module, name in list(self._names.items()) if unseen else ():
            held = (*vars(module).values(), *module._buffers.values())
            if any(id(value) in unseen for value in held):
                self.shown_states.add(name)

    # -- what fx asks -----------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is one node."""
        return self.leaf(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Attributes stay as they are: a parameter in use is recognised by its identity."""
        return attr_val

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A module is called: record it if it is a leaf, else follow it."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if self.recorder is not None:
            return self.recorder.call_module(m, forward, args, kwargs)
        if self.computing:
            return self._run_inner(m, forward, args, kwargs)
        if self.repeats is not None and self.repeats.expected is not None:
            target = self._names.get(m)
            if target is not None and self.repeats.expected.fits(target, args, kwargs):
                return self._repeat_expected(m, target, args, kwargs)
        with self.inside(m):
            try:
                if type(m) in self.leaf.opaque or is_scripted_block(m):
                    call = functools.partial(call_module_untraced, m)
                    return self._run_opaque(call, args, kwargs)
                if self.leaf(m):
                    return self._record("call_module", self.name_of(m), args, kwargs)
                return forward(*args, **kwargs)
            except Exception:
                if not self.leaf(m):  # a leaf runs as it always does: what failed is around it
                    self._failed_in = self._failed_in or m
                raise

    @contextlib.contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """What is recorded in the block comes from ``module``."""
        self._scope.append(module)
        try:
            yield
        finally:
            self._scope.pop()

    def name_of(self, module: nn.Module) -> str:
        """The qualified name; modules outside the tree get one that says so."""
        if module not in self._names:
            self._names[module] = f"unregistered.{type(module).__name__}_{len(self._names)}"
        return str(self._names[module])

    def create_arg(self, a: Any) -> Any:
        """Turn an argument into what a node may hold."""
        if isinstance(a, fx.Node):
            return a
        if isinstance(a, Tensor):
            return a.node if isinstance(a, Traced) else self.constant(a)
        if isinstance(a, tuple | list):
            return tuple(self.create_arg(x) for x in a)
        if isinstance(a, slice):
            return slice(*(self.create_arg(x) for x in (a.start, a.stop, a.step)))
        if isinstance(a, dict):
            return {str(k): self.create_arg(v) for k, v in a.items()}
        if getattr(a, "shape", None) == () and hasattr(a, "item"):
            a = a.item()  # numpy's numbers
        return a if isinstance(a, PLAIN) or a is None or a is ... else type(a).__name__

    def constant(self, tensor: Tensor) -> fx.Node:
        """The node of any tensor that no recorded operation made: a parameter, buffer or constant.

        Raises:
            Untraceable: for a tensor that seems to have been made by code we did not see.
        """
        tensor = self._stands_for.get(id(tensor), tensor)
        if id(tensor) not in self._constants:
            same = None if self.unseen is None else self.unseen.node_of(tensor)
            if same is not None:
                return same
            known = id(tensor) in self._known or tensor.numel() <= 1 or self.recorder is not None
            known |= self.unseen is not None and not self.unseen.used
            if not known:
                raise UnknownTensor(
                    f"a tensor of shape {tuple(tensor.shape)} comes from code that cannot be "
                    "followed, for instance a scripted function or numpy"
                )
            name = self._tensor_names.get(id(tensor), f"constant_{len(self._constants)}")
            node = self.create_node("get_attr", name, (), {})
            measure = not isinstance(tensor, nn.Parameter)
            node.meta |= {"value": describe(tensor, measure=measure), "tensor": tensor}
            self._constants[id(tensor)] = (tensor, node)
        return self._constants[id(tensor)][1]

    def _read(self, parameters: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
        """A module hands out a computed parameter: once per trace, and none of our business how."""
        parameter = parameters[0]
        inside = self.computing or (self.recorder is not None and self.recorder.in_leaf)
        if inside or id(parameter) not in self._tensor_names:
            return compute()
        if id(parameter) not in self._handed_out:
            with self._aside(), disable_current_modes():
                value = self._handed_out[id(parameter)] = compute()
            self._stands_for[id(value)] = parameter
            for other in parameters[1:]:
                self.constant(other)  # seen in use
        return self._handed_out[id(parameter)]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node, with the module it comes from."""
        self._count += 1
        self.limits.check(self._count)
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.name_of(self._scope[-1]) if self._scope else ""
        return node

    def _node(self, args: tuple[Any, ...], value: Callable[[], ValueInfo]) -> fx.Node:
        """A node of the operation at hand, described by ``value``; or what stands for it."""
        if self._repeated is not None:
            return next(self._repeated)
        node = self.create_node("call_function", *args, {})
        node.meta["value"] = value()
        if self._operation is not None:
            self._operation.nodes.append(node)
        return node

    # -- recording and computing ------------------------------------------------------------------

    def on_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function is called: compute it, and record it if tensors come out."""
        if self.computing or self.recorder is not None:
            return func(*args, **kwargs)
        if self.unseen is not None and func in HANDING_OUT:
            self.unseen.used = True
        if func in _DETACHING:
            return args[0]  # nothing is attached, and a view would refuse
        if self.repeats is not None and self.repeats.expected is not None:
            if func in OF_SHAPE:
                return func(*args, **kwargs)
            if self.repeats.expected.fits(func, args, kwargs):
                return self._repeat_expected(None, func, args, kwargs)
        return self._record("call_function", func, args, kwargs)

    def _record(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        module = self._scope[-1] if kind == "call_module" else None
        surrogate = isinstance(target, SurrogateCall)
        unwrapped = Unwrapped()
        with self._aside():
            operation = self._operation_of(target, module, args, kwargs)
            known = None
            if operation is not None and self.repeats is not None:
                known = self.repeats.seen_before(operation)
            call_args, call_kwargs = unwrapped.plain((args, kwargs))
            driven = None
            if known is None and (surrogate or module in self.leaf.unknown):
                driven = self._probe(module, target, call_args, call_kwargs)
            torchs = not surrogate and (
                module is None or type(module).__module__[:9] == "torch.nn."
            )
            if known and operation and operation.ordinary and torchs and not surrogate:
                with disable_torch_dispatch(), DisableTorchFunction():  # what it may write is saved
                    value = self._call(module, target, call_args, call_kwargs)
            else:
                value = self._compared(module, target, call_args, call_kwargs)
            written = written_argument(target, args)
            if written is None and not holds_tensors(value):
                return value
            made = value if written is None else written
            if known is not None and is_like(made, known.nodes[0].meta["value"]):
                repeated = self._repeat(known, value, written, unwrapped)
                if operation is not None and self.repeats is not None:
                    known.template = template_of(
                        *(target, args, kwargs, repeated),
                        takes_part=self.repeats.takes_part(operation),
                        of_torch=torchs and operation.ordinary,
                    )
                return repeated
            node = self.create_node(
                kind, target, self.create_arg(args), self.create_arg(kwargs), label(target)
            )
            info = describe(value, measure=self.measure or surrogate or module is not None)
            node.meta |= {"value": worst_of(info, driven), "driven": driven, "module": module}
            if surrogate or getattr(target, "__name__", "").strip("_") in COMPARING:
                node.meta["at"] = call_site()
            if surrogate:
                node.meta["steps"] = self._steps.get(target, True)
            with self._noting(operation, node):
                return self._result(node, value, written, unwrapped)

    def _repeat_expected(
        self, module: nn.Module | None, target: Any, args: Any, kwargs: Any
    ) -> Any:
        """Compute what is known to come: an operation of torch's whose result is one tensor."""
        assert self.repeats is not None
        expected = self.repeats.expected
        assert expected is not None
        call = target if module is None else functools.partial(call_module_untraced, module)
        if expected.of_torch:
            with disable_torch_dispatch(), DisableTorchFunction():
                value = call(*args, **kwargs)
                taken = expected.take(value, args)
        else:  # the user's code: what it writes is seen, and it is given ordinary tensors
            plain_args, plain_kwargs = Unwrapped().plain((args, kwargs))
            with self._aside(), self._in(module), self._unwatched(module):
                value = call(*plain_args, **plain_kwargs)
            with disable_torch_dispatch(), DisableTorchFunction():
                taken = expected.take(value, args)
        if taken is None:
            kind = "call_function" if module is None else "call_module"
            with self._in(module):
                return self._record(kind, target, args, kwargs)
        self.repeats.skip()
        return self.noted(taken)

    @contextlib.contextmanager
    def _unwatched(self, module: nn.Module | None) -> Iterator[None]:
        """A framework's neuron whose rule is known in full writes nothing but its state."""
        if module is None or module in self.leaf.unknown:
            yield
            return
        with disable_torch_dispatch(), DisableTorchFunction():
            yield

    def _in(self, module: nn.Module | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if module is None else self.inside(module)

    def _operation_of(
        self, target: Any, module: nn.Module | None, args: Any, kwargs: Any
    ) -> Operation | None:
        """What is compared with what was recorded, to notice a loop over time."""
        if self.repeats is None:
            return None
        scope = id(self._scope[-1]) if self._scope else 0
        locus = (target, scope, *place_of_call())
        return Operation.of(locus, (args, kwargs), is_neuron=module in self.leaf.neurons)

    @contextlib.contextmanager
    def _noting(self, operation: Operation | None, node: fx.Node) -> Iterator[None]:
        """The nodes that the block makes belong to ``operation``, after ``node``."""
        self._operation = operation
        try:
            if operation is not None:
                operation.nodes.append(node)
            yield
        finally:
            self._operation = None
        if operation is not None and self.repeats is not None:
            self.repeats.add(operation)

    def _repeat(
        self, known: Operation, value: Any, written: Tensor | None, unwrapped: Unwrapped
    ) -> Any:
        """``value`` with the nodes of an earlier step, which has seen its kind of values too."""
        assert self.repeats is not None
        self.repeats.skip()
        self._repeated = iter(known.nodes)
        try:
            node = next(self._repeated)
            node.meta["repeats"] = node.meta.get("repeats", 0) + 1
            widen(node, value)
            return self._result(node, value, written, unwrapped)
        finally:
            self._repeated = None

    def _result(
        self, node: fx.Node, value: Any, written: Tensor | None, unwrapped: Unwrapped
    ) -> Any:
        if written is not None:
            self._rebind(written, node)
            return value
        return self._wrap(node, value, unwrapped)

    def _wrap(self, node: fx.Node, value: Any, unwrapped: Unwrapped) -> Any:
        """Turn a result into traced tensors; containers are taken apart."""
        if isinstance(value, Tensor):
            same = unwrapped.origin(value)
            if same is not None:  # the result is the argument: written to, or as it was
                self._rebind(same, node, written=node.target not in _AS_IT_WAS)
                return same
            return self.noted(as_traced(value, node, unwrapped.base(value)))
        return rebuild(value, lambda key, item: self._item(node, key, item, unwrapped))

    def noted(self, traced: Any) -> Any:
        """One tensor of the trace or a tuple of them, known by their memory where that matters."""
        if self.unseen is not None:
            for tensor in traced if isinstance(traced, tuple) else (traced,):
                self.unseen.made(tensor, tensor.node)
        return traced

    def _item(self, node: fx.Node, key: Any, item: Any, unwrapped: Unwrapped) -> Any:
        def described() -> ValueInfo:
            info = describe(item, measure=self.measure or node.op == "call_module")
            return worst_of(info, node.meta.get("driven")) if key == 0 else info

        child = self._node((operator.getitem, (node, key)), described)
        if self._repeated is not None:
            widen(child, item)
        return self._wrap(child, item, unwrapped)

    def _rebind(self, tensor: Tensor, node: fx.Node, *, written: bool = True) -> None:
        """Every later use of ``tensor`` comes from ``node``; if written, of its base as well."""
        node.meta["value"] = describe(tensor)
        if not isinstance(tensor, Traced):
            raise Untraceable("the model writes into a tensor that it did not make in this call")
        tensor.node = node
        self.noted(tensor)
        base = tensor.base if written else None
        while base is not None:
            update = (write_view, (base.node, node))
            base.node, base = self._node(update, functools.partial(describe, base)), base.base

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What happens inside is not recorded."""
        before, self.computing = self.computing, True
        self._look(False)
        try:
            yield
        finally:
            self.computing = before
            self._look(not before and self.recorder is None)

    def _look(self, looking: bool) -> None:
        if self.unseen is not None:
            self.unseen.looking = looking

    def _call(self, module: nn.Module | None, target: Any, args: Any, kwargs: Any) -> Any:
        if module is not None:
            return call_module_untraced(module, *args, **kwargs)
        return target(*args, **kwargs)

    def _compared(self, module: nn.Module | None, target: Any, args: Any, kwargs: Any) -> Any:
        """The same; the first time also whether a layer multiplies what its weight's mask masks."""
        first = module is not None and is_weight_layer(module) and module not in self._layers
        if module is None or not first or not has_own_forward(module):
            return self._call(module, target, args, kwargs)
        call = functools.partial(self._call, module, target, args, kwargs)
        value, why_not = run_and_compare(module, call)
        self._layers.add(module)
        if why_not:
            self.computed[self.name_of(module)] = why_not
        return value

    def _run_inner(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module inside a leaf runs for real; weight layers (recurrent ones) are counted."""
        out = forward(*args, **kwargs)
        inside = self._scope and self._scope[-1] is not m and not self._probing
        if inside and is_weight_layer(m):
            seen = self.inner.setdefault(self.name_of(m), InnerCall(self.name_of(self._scope[-1])))
            seen.calls += 1
            seen.input_shape = seen.input_shape or tuple(args[0].shape)
            seen.output_shape = seen.output_shape or tuple(out.shape)
        return out

    def _on_apply(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An autograd Function is one operation: usually somebody's spike."""
        if self.computing or self.recorder is not None:
            return NotImplemented
        if self.repeats is not None and self.repeats.expected is not None:
            expected = self.repeats.expected
            if expected.fits(SurrogateCall(function), args, kwargs):
                return self._repeat_expected(None, expected.target, args, kwargs)
        flat = tree_flatten((args, kwargs))[0]
        if any(isinstance(x, nn.Module) for x in flat):
            return NotImplemented  # a checkpoint-like Function: what matters happens inside
        return self._record("call_function", SurrogateCall(function), args, kwargs)

    def _probe(
        self, module: nn.Module | None, target: Any, args: Any, kwargs: Any
    ) -> Measured | None:
        """What a step function or hand-written neuron emits when driven hard.

        The example may leave it silent; large inputs tell {0,1} from several levels.
        """
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        if module is not None and module in self._probed:
            return self._probed[module]
        self._probing = True
        try:
            with preserved(module) if module is not None else contextlib.nullcontext():
                wide = torch.linspace(-20.0, 60.0, args[0].numel(), device=args[0].device)
                driven = wide.to(args[0].dtype).reshape(args[0].shape)
                out = self._call(module, target, (driven, *args[1:]), kwargs)
                first = next((t for t in tree_flatten(out)[0] if isinstance(t, Tensor)), None)
                found = kind_of_values(first, largest=math.inf) if first is not None else None
                if isinstance(target, SurrogateCall) and first is not None:
                    self._steps[target] = first.numel() < 64 or first.unique().numel() <= 32
        except Exception:
            return None
        finally:
            self._probing = False
        if module is not None:
            self._probed[module] = found
        return found

    # -- opaque submodules ------------------------------------------------------------------------

    def _run_opaque(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``call`` for real under the recorder; its operations join this graph."""
        unwrapped, recorder = Unwrapped(), Recorder(self)
        self.recorder = recorder
        self._look(False)
        try:
            plain_args, plain_kwargs = unwrapped.plain((args, kwargs))
            for plain, traced in unwrapped:
                recorder.remember(plain, traced.node)
            with recorder:
                out = call(*plain_args, **plain_kwargs)
                out = list(out) if inspect.isgenerator(out) else out
            return tree_map(
                lambda t: (
                    self.noted(as_traced(t, recorder.node_of(t))) if isinstance(t, Tensor) else t
                ),
                out,
            )
        finally:
            self.recorder = None
            self._look(not self.computing)
