# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that this package uses, in one place.

No import depends on one of them.  Each is looked up here with something to take its place; where
nothing can, the place is taken by what raises a :class:`~spikenm_fx.errors.TorchVersionError`, when
it is used, that says what does not work.  All were tried with torch 2.13.0 and 2.14.1; where a name
was missing was tried by taking it away.

==========================  =================================================  =====================
name here                   torch's                                            where it is missing
==========================  =================================================  =====================
``ConvNd``                  ``nn.modules.conv._ConvNd``                        the public classes
``ConvTransposeNd``         ``nn.modules.conv._ConvTransposeNd``               the public classes
``BatchNormBase``           ``nn.modules.batchnorm._BatchNorm``                the public classes
``NormBase``                ``nn.modules.batchnorm._NormBase``                 the public classes
``DropoutBase``             ``nn.modules.dropout._DropoutNd``                  the public classes
``tree_flatten`` and kin    ``utils._pytree.tree_flatten``, ...                error: nested inputs
``TorchDispatchMode``       ``utils._python_dispatch.TorchDispatchMode``       error: trace, pack
``DispatchMode``            ``TorchDispatchMode._should_skip_dynamo``          dynamo is imported
``disable_current_modes``   ``utils._python_dispatch._disable_current_modes``  error: masked traces
``disable_torch_dispatch``  ``_C._DisableTorchDispatch``                      modes see all: slower
``DisableTorchFunction``    ``_C.DisableTorchFunction``                        error: trace
``no_torch_function``       ``_C._disabled_torch_function_impl``               error: trace
``call_module_untraced``    ``fx._symbolic_trace._orig_module_call``           ``Module.__call__``
``operator_name``           ``_ops.OpOverload._schema``                        from its printed form
``written_arguments``       ``_ops.OpOverload._schema``                        None: any may be
``may_alias``               ``_ops.OpOverload._schema``                        True
``make_wrapper``            ``Tensor._make_wrapper_subclass``                  error: pack
``foreach``                 ``_foreach_add_``, ``_foreach_mul``, ...           one after the other
``storage_id``              ``UntypedStorage._cdata``                          ``data_ptr()``
``is_scripted``             ``jit.ScriptModule._c``                            False
``data_parallel_group``     ``DistributedDataParallel._active_ddp_module``      None: no ranks
``disable_dynamo``          ``_compile._disable_dynamo``                       ``compiler.disable``
``runs_while_compiling``    ``_dynamo_marked_constant`` of functions           graph breaks
``run_as_eager``            ``compiler._is_compiling_flag``                    it is not told
``trace_autograd``          ``_dynamo.config.trace_autograd_ops``              graph breaks
``autograd_inside_...``     ``_C._ForceDispatchKeyGuard``                      some credits missing
``behind_compiled``         ``_dynamo.config.error_on_nested_fx_trace``        error: trace
``keep_in_order``           ``CustomOpDef.register_effect``                    credits may be lost
``global_hooks``            ``nn.modules.module._global_forward_hooks``, ...   none
``dynamo_is_imported``      ``_dynamo``, among the imported modules            False
``in_functorch``            ``_C._functorch.peek_interpreter_stack``           False
``is_captured``             ``fx.experimental.proxy_tensor.get_proxy_mode``    not by make_fx
``is_functorch_tensor``     ``_C._functorch.is_functorch_wrapped_tensor``      False
``is_stacked_by_vmap``      ``_C._functorch.is_batchedtensor``, ...            False
``in_backward``             ``_C._current_graph_task_id``                      False
``has_saved_tensor_hooks``  ``_C._autograd._top_saved_tensors_default_hooks``  False
``quiet_triton``            the logger ``torch._library.triton``                nothing to quiet
``local_part``              ``DTensor._local_tensor``                          ``DTensor.to_local``
``shard_offsets``           ``distributed.tensor._utils.compute_local_...``    error: sharded masks
``is_fsdp_managed``         ``Module._is_fsdp_managed_module``                 False
``fsdp_has_run``            ``FSDPModule._get_fsdp_state()._is_root``          False
``is_fsdp_module``          ``FSDPModule._get_fsdp_state``                     False
``joins_uneven``            ``DistributedDataParallel._join_config``           False
``node_outputs``            ``autograd.graph.Node._input_metadata``            error: EID, sharded
==========================  =================================================  =====================

The dictionaries that every module carries (``_parameters``, ``_buffers``, ``_modules``, its hooks)
are not listed: their names are part of what pickled models hold.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import TorchVersionError

__all__ = [
    "CHECKPOINTS",
    "FSDP1",
    "SHARDING",
    "BatchNormBase",
    "ConvNd",
    "ConvTransposeNd",
    "DisableTorchFunction",
    "DispatchMode",
    "DropoutBase",
    "NormBase",
    "TorchDispatchMode",
    "autograd_inside_operator",
    "call_module_untraced",
    "data_parallel_group",
    "disable_current_modes",
    "disable_dynamo",
    "disable_torch_dispatch",
    "dynamo_is_imported",
    "foreach",
    "fsdp_has_run",
    "global_hooks",
    "has_saved_tensor_hooks",
    "in_backward",
    "in_functorch",
    "is_captured",
    "is_fsdp_managed",
    "is_fsdp_module",
    "is_fsdp_node",
    "is_functorch_tensor",
    "is_scripted",
    "is_stacked_by_vmap",
    "joins_uneven",
    "keep_in_order",
    "local_part",
    "make_wrapper",
    "may_alias",
    "no_torch_function",
    "node_outputs",
    "operator_name",
    "quiet_triton",
    "run_as_eager",
    "runs_while_compiling",
    "semi_structured_compress",
    "shard_offsets",
    "storage_id",
    "storage_kept_apart",
    "trace_autograd",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "written_arguments",
    "zeros_for_none",
]


def _find(path: str, name: str) -> Any:
    """``torch.<path>.<name>``, or None where this torch has no such thing."""
    with contextlib.suppress(ImportError, AttributeError):
        return getattr(importlib.import_module(f"torch.{path}"), name)
    return None


def _required(path: str, name: str, what: str) -> Any:
    """The same; where it is missing a class that cannot be used, and says so."""
    found = _find(path, name)
    if found is not None:
        return found

    class Missing:
        def __init__(self, *_: object, **__: object) -> None:
            raise TorchVersionError(
                f"torch {torch.__version__} has no torch.{path}.{name}, without which {what} does "
                "not work; this package was tried with torch 2.13.0 and 2.14.1"
            )

    return Missing


def _base(path: str, name: str, *public: type[nn.Module]) -> Any:
    """A base class of ``public`` that torch names privately; without it, a class they count as."""
    found = _find(path, name)
    if found is not None:
        return found
    anyone = abc.ABCMeta(name, (), {})
    for cls in public:
        anyone.register(cls)
    return anyone


if TYPE_CHECKING:
    from torch._C import DisableTorchFunction
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
    from torch.nn.modules.dropout import _DropoutNd as DropoutBase
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
else:
    _convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    _transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    _batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    _instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    _dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    _dropouts += (nn.AlphaDropout, nn.FeatureAlphaDropout)
    ConvNd = _base("nn.modules.conv", "_ConvNd", *_convs, *_transposed)
    ConvTransposeNd = _base("nn.modules.conv", "_ConvTransposeNd", *_transposed)
    BatchNormBase = _base("nn.modules.batchnorm", "_BatchNorm", *_batch)
    NormBase = _base("nn.modules.batchnorm", "_NormBase", *_batch, *_instance)
    DropoutBase = _base("nn.modules.dropout", "_DropoutNd", *_dropouts)
    _nested = functools.partial(_required, "utils._pytree", what="a nest of inputs or outputs")
    tree_flatten, tree_leaves = _nested("tree_flatten"), _nested("tree_leaves")
    tree_map, tree_unflatten = _nested("tree_map"), _nested("tree_unflatten")
    TorchDispatchMode = _required("utils._python_dispatch", "TorchDispatchMode", "tracing a model")
    DisableTorchFunction = _required("_C", "DisableTorchFunction", "tracing a model")

no_torch_function: Any = _required("_C", "_disabled_torch_function_impl", "tracing a model")
"""For ``__torch_function__`` of a subclass of Tensor: its functions return ordinary tensors."""

make_wrapper: Any = getattr(Tensor, "_make_wrapper_subclass", None) or _required(
    "Tensor", "_make_wrapper_subclass", "running packed layers"
)
"""A tensor of a subclass with shape, strides, dtype and device, and no memory of its own."""

disable_current_modes: Any = _required(
    "utils._python_dispatch", "_disable_current_modes", "tracing a model with masks"
)
"""A context manager: dispatch modes that are entered see nothing of what happens inside."""

disable_torch_dispatch: Any = _find("_C", "_DisableTorchDispatch") or contextlib.nullcontext
"""A context manager, quicker to enter: neither modes nor subclasses see what is dispatched."""

call_module_untraced: Callable[..., Any] = (
    _find("fx._symbolic_trace", "_orig_module_call") or nn.Module.__call__
)
"""``nn.Module.__call__`` as it is while fx exchanges it."""


def disable_dynamo(function: Any) -> Any:
    """Leave ``function`` out of compiled code; dynamo is not imported before it is called."""
    return (_find("_compile", "_disable_dynamo") or torch.compiler.disable)(function)


class DispatchMode(TorchDispatchMode):
    """A ``TorchDispatchMode`` that leaves dynamo alone as long as nobody has imported it.

    Torch's own imports it at the first operation, to keep it from compiling the mode: two seconds,
    and nothing to keep where nothing is compiled.
    """

    _is_never_compiled = False

    def __enter__(self) -> Any:
        cls = type(self)
        if dynamo_is_imported() and not cls._is_never_compiled:
            cls.__torch_dispatch__ = disable_dynamo(cls.__torch_dispatch__)  # type: ignore[method-assign]
            cls._is_never_compiled = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def dynamo_is_imported() -> bool:
    """Whether anything can have been compiled; the import itself takes seconds."""
    return "torch._dynamo" in sys.modules


def runs_while_compiling(function: Any) -> Any:
    """Call ``function`` while a graph is made, with the tensors it is made for; leave no guard.

    ``torch.compiler.assume_constant_result`` without an import of dynamo.
    """
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def run_as_eager() -> Iterator[None]:
    """What is run inside while a graph is made is not compiled, nor does it take itself for that.

    Of modules that were compiled in place as well.  Else dynamo would look at their functions while
    a mode is active under which it compiles nothing, and never look at them again.
    """
    compiling = getattr(torch.compiler, "_is_compiling_flag", None)
    with torch.compiler.set_stance("force_eager"):
        if compiling is None:
            yield
            return
        torch.compiler._is_compiling_flag = False
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = compiling


@contextlib.contextmanager
def behind_compiled() -> Iterator[None]:
    """Let fx trace the code that ``torch.compile`` was given, where a model calls that."""
    config = _find("_dynamo.config", "patch") if dynamo_is_imported() else None
    if config is None or not hasattr(torch._dynamo.config, "error_on_nested_fx_trace"):
        yield
        return
    with config(error_on_nested_fx_trace=False):
        yield


def keep_in_order(*operators: Any) -> None:
    """Let no pass of a compiler remove custom operators, or exchange them with one another."""
    ordered = getattr(_find("_library.effects", "EffectType"), "ORDERED", None)
    for operator in operators:
        if ordered is not None and hasattr(operator, "register_effect"):
            operator.register_effect(ordered)


@runs_while_compiling
def trace_autograd(wanted: bool) -> bool:
    """Whether the graph being made may hold gradients from here on; what it was before."""
    config: Any = _find("_dynamo", "config")
    before = bool(getattr(config, "trace_autograd_ops", False))
    if config is not None and hasattr(config, "trace_autograd_ops"):
        config.trace_autograd_ops = wanted
    return before


def autograd_inside_operator() -> Any:
    """A context manager: what runs inside a custom operator may ask for gradients."""
    below, guard = (
        _find("_C", "_dispatch_tls_local_exclude_set"),
        _find("_C", "_ForceDispatchKeyGuard"),
    )
    if below is None or guard is None:
        return contextlib.nullcontext()
    left_out = below()
    for key in ("Functionality", "Other", "CPU", "CUDA", "XPU", "PrivateUse1"):
        left_out = left_out.remove(getattr(torch._C.DispatchKey, f"Autograd{key}"))
    return guard(torch._C._dispatch_tls_local_include_set(), left_out)


def operator_name(target: Any) -> str | None:
    """``"add"`` for ``aten.add.Tensor``; None for what is no operator overload."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1]
    return str(target).split(".")[1] if type(target).__name__ == "OpOverload" else None


def written_arguments(operator: Any) -> tuple[tuple[int, str], ...] | None:
    """Place and name of each argument that ``operator`` writes into; None: any may be."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return None
    # batch norms write their running statistics without saying so
    silent = "batch_norm" in schema.name
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if silent or (argument.alias_info is not None and argument.alias_info.is_write)
    )


def may_alias(operator: Any) -> bool:
    """Whether ``operator`` may write into an argument, or return a view of one."""
    schema = getattr(operator, "_schema", None)
    return schema is None or any(argument.alias_info is not None for argument in schema.arguments)


def foreach(name: str, tensors: Sequence[Tensor], *others: Any, **options: Any) -> list[Tensor]:
    """``Tensor.<name>`` of each of ``tensors``, of any shapes, in few launches.

    Args:
        name: ``"mul"``, or ``"mul_"`` for in place, and so on.
        tensors: what to call it of.
        others: further arguments: lists have one for each tensor, all else is for all of them.
        options: such as ``alpha``, the same for all of them.

    Returns:
        the results; for operations in place the tensors themselves.
    """
    together = getattr(torch, f"_foreach_{name}", None)
    if together is not None:
        return list(together(tensors, *others, **options) or tensors)
    each = [o if isinstance(o, list | tuple) else [o] * len(tensors) for o in others]
    rows = zip(tensors, *each, strict=True)
    return [getattr(tensor, name)(*row, **options) for tensor, *row in rows]


def semi_structured_compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's own conversion of a 2:4 matrix to CUTLASS's layout, on any device.

    Args:
        dense: ``(rows, columns)``, float16, bfloat16 or int8, its sides in the vendor's multiples.
            **A third non-zero of a block is dropped without a word**: count before.

    Returns:
        The kept values ``(rows, columns / 2)`` and their positions, ``(rows, columns / 16)`` of
        int16 or ``(rows, columns / 32)`` of int32.
    """
    path = "sparse._semi_structured_conversions"
    convert = _required(path, "sparse_semi_structured_from_dense_cutlass", "semi_structured")
    values, positions = convert(dense)
    return values, positions


def storage_id(tensor: Tensor) -> int:
    """A number that tensors of one storage share, as long as it lives.

    Args:
        tensor: any; one that is not strided has a number of its own.
    """
    if tensor.layout is not torch.strided:
        return -id(tensor)
    storage = tensor.untyped_storage()
    own = getattr(storage, "_cdata", None)
    return int(storage.data_ptr() if own is None else own)


def storage_kept_apart(tensor: Tensor) -> object:
    """What keeps :func:`storage_id` from being given to another storage, while it is held.

    It does not keep the memory: a weak reference to the storage.

    Args:
        tensor: any; None for one that is not strided.
    """
    if tensor.layout is not torch.strided:
        return None
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


_transforms = _find("_C._functorch", "peek_interpreter_stack")
_wrapped = _find("_C._functorch", "is_functorch_wrapped_tensor")
_batched = _find("_C._functorch", "is_batchedtensor")
_unwrapped = _find("_C._functorch", "get_unwrapped")
_backward_task = _find("_C", "_current_graph_task_id")
_saved_tensors_hooks = _find("_C._autograd", "_top_saved_tensors_default_hooks")


def quiet_triton() -> None:
    """Do not let torch warn that Triton, which nothing here needs, is not installed."""
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def data_parallel_group() -> Any:
    """The process group of the DistributedDataParallel whose forward runs now, if one does."""
    active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    return None if active is None else active.process_group


def joins_uneven() -> bool:
    """Whether the DistributedDataParallel whose forward runs now goes on without some ranks."""
    active: Any = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    config = getattr(active, "_join_config", None)
    return bool(
        getattr(config, "enable", False)
        and not getattr(config, "throw_on_early_termination", False)
        and torch.distributed.get_world_size(active.process_group) > 1
    )


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor of any shape: the tensor itself, not a view of it."""
    found = getattr(tensor, "_local_tensor", None)
    if found is None or hasattr(found, "wait"):  # a collective on its way
        with torch.no_grad():
            found = tensor.to_local()
    return found  # type: ignore[no-any-return]


def shard_offsets(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of what this rank holds of a DTensor, and where in the whole it begins, by axis."""
    compute = _required(
        "distributed.tensor._utils", "compute_local_shape_and_global_offset", "sharding masks"
    )
    shape, first = compute(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(first)


SHARDING = ("torch.distributed.fsdp._fully_shard", "torch.distributed.tensor")
"""Modules of torch that make DTensors of the parameters of others."""

CHECKPOINTS = "torch.distributed.checkpoint.state_dict"
"""The module of torch that gives out and takes state dicts of models on many ranks."""

FSDP1 = ("torch.distributed.fsdp._dynamo_utils",)
"""By which FullyShardedDataParallel, before it flattens parameters, marks their modules."""


def fsdp_has_run(module: nn.Module) -> bool:
    """Whether ``module`` is under ``fully_shard``, and has gathered parameters already."""
    state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
    return getattr(state, "_is_root", None) is not None


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called of ``module`` itself."""
    return hasattr(module, "_get_fsdp_state")


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether ``fully_shard`` takes care of the parameters of ``module``."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def is_fsdp_node(node: Any) -> bool:
    """Whether a node of a graph is FSDP2's, which reduces gradients when they pass through it."""
    return bool(node.name().startswith("RegisterPostBackwardFunction"))


def node_outputs(node: Any) -> int:
    """How many tensors the operation gave that a node of a graph differentiates."""
    found = getattr(node, "_input_metadata", None)
    if found is None:
        raise TorchVersionError(
            f"torch {torch.__version__} does not tell how many outputs {node.name()} has, without "
            "which EID does not look into graphs under fully_shard: use SpikeNM(eid=None) there"
        )
    return len(found)


def zeros_for_none(node: Any, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients as a node of a graph expects them, zeros where there are none."""
    return [
        torch.zeros(about.shape, dtype=about.dtype, device=about.device) if grad is None else grad
        for grad, about in zip(grads, node._input_metadata, strict=True)
    ]


def is_scripted(value: object) -> bool:
    """Whether torch's script compiler runs this module; with ``PYTORCH_JIT=0`` none is."""
    return isinstance(value, torch.jit.ScriptModule) and hasattr(value, "_c")


def in_functorch() -> bool:
    """Whether ``torch.func`` transforms what runs now."""
    return _transforms is not None and _transforms() is not None


def is_captured() -> bool:
    """Whether ``torch.func`` transforms what runs now, or a tracer makes a graph of it."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    mode = None if proxies is None else getattr(proxies, "get_proxy_mode", lambda: None)()
    return in_functorch() or mode is not None or bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def is_functorch_tensor(tensor: Tensor) -> bool:
    """Whether ``tensor``, of any shape, stands for another inside a ``torch.func`` transform."""
    return _wrapped is not None and bool(_wrapped(tensor))


def is_stacked_by_vmap(tensor: Tensor) -> bool:
    """Whether ``tensor``, of any shape, stands for several that ``torch.vmap`` has stacked."""
    while _batched is not None and _unwrapped is not None and is_functorch_tensor(tensor):
        if _batched(tensor):
            return True
        tensor = _unwrapped(tensor)
    return False


def has_saved_tensor_hooks() -> bool:
    """Whether somebody packs what is saved for backward now, as checkpointed parts do."""
    return _saved_tensors_hooks is not None and _saved_tensors_hooks(True) is not None


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return _backward_task is not None and _backward_task() != -1


def global_hooks() -> list[Any]:
    """The hooks that run for every module of the process; none where torch keeps them elsewhere."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    found = (_find("nn.modules.module", f"_global_{kind}") for kind in kinds)
    return [hook for hooks in found if hooks for hook in list(hooks.values())]
