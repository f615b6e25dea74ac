# SPDX-License-Identifier: Apache-2.0
"""One name for an operation, however it was called, and the families the analyses need.

``x + y``, ``torch.add``, ``x.add_(y)`` and ``aten.add.Tensor`` are all ``"add"``.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from spikenm_fx._torch import DropoutBase, operator_name
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace.execution.leaves import NORMS
from spikenm_fx.trace.execution.values import SurrogateCall, write_view

__all__ = [
    "ELEMENTWISE",
    "MATMULS",
    "MOVES",
    "POOLS",
    "RESHAPES",
    "module_family",
    "op_name",
]

_ALIASES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "subtract": "sub",
    "multiply": "mul",
    "negative": "neg",
    "floordiv": "floor_divide",
    "iand": "and",
    "ior": "or",
    "ixor": "xor",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "xor",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_not": "not",
    "invert": "not",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "absolute": "abs",
    "clip": "clamp",
    "hardtanh": "clamp",
    "_unsafe_view": "view",
    "_to_copy": "to",
    "copy": "to",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "radd": "add",
    "rmul": "mul",
    "rdiv": "reciprocal",
    "rtruediv": "reciprocal",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "max_pool2d_with_indices": "max_pool2d",
    "convolution": "conv",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


RESHAPES = _words(
    "reshape view flatten unflatten squeeze unsqueeze view_as reshape_as ravel rearrange"
)
MOVES = _words("permute transpose t movedim moveaxis T mT adjoint")
POOLS = _words(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d lp_pool2d"
)
MATMULS = _words(
    "linear conv conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul "
    "mm bmm addmm baddbmm mv addmv einsum bilinear scaled_dot_product_attention"
)
COPIES = _words(
    "contiguous clone detach to float double half bfloat16 type type_as cuda cpu alias data "
    "requires_grad lift_fresh expand expand_as repeat repeat_interleave tile broadcast_to "
    "broadcast_tensors dropout dropout1d dropout2d dropout3d alpha_dropout native_dropout "
    "feature_dropout identity"
)
SELECTIONS = _words(
    "getitem select slice narrow index index_select gather take chunk split tensor_split unbind "
    "stack cat hstack vstack dstack roll flip fliplr flipud unfold fold im2col pixel_shuffle "
    "pixel_unshuffle where masked_fill masked_scatter scatter scatter_add index_copy index_put "
    "setitem write_view pad constant_pad_nd diagonal diag tril triu as_strided max min amax "
    "amin maximum minimum sort topk cummax channel_shuffle upsample_nearest1d "
    "upsample_nearest2d meshgrid split_with_sizes nonzero_static unsafe_split unsafe_chunk"
)
COMPARISONS = _words(
    "gt ge lt le eq ne isnan isinf isfinite and or xor not bool any all heaviside one_hot "
    "bernoulli greater signbit"
)
ELEMENTWISE = (
    COPIES
    | COMPARISONS
    | _words(
        "add sub mul div neg abs relu relu6 sigmoid tanh exp log sqrt rsqrt pow square clamp "
        "clamp_min clamp_max floor ceil round trunc sign where masked_fill maximum minimum "
        "leaky_relu gelu silu elu softplus erf sin cos rsub addcmul addcdiv lerp floor_divide "
        "remainder fmod mish hardsigmoid hardswish threshold reciprocal atan log1p expm1 celu selu "
        "logsigmoid hardshrink softsign nan_to_num fill zero zeros_like ones_like rand_like "
        "randn_like full_like empty_like setitem"
    )
)


def op_name(node: fx.Node) -> str:
    """The canonical name of a ``call_function`` or ``call_method`` node."""
    target: Any = node.target
    if isinstance(target, SurrogateCall):
        return "surrogate"
    if target is write_view:
        return "write_view"
    if target is getattr:
        return str(node.args[1])
    operator = operator_name(target)
    if operator is not None:
        name = operator
    elif isinstance(target, str):
        name = target
    else:
        name = getattr(target, "__name__", type(target).__name__)
        if name == "__get__":
            name = getattr(target.__self__, "__name__", name)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    return _ALIASES.get(name, name)


_SAME = (nn.Identity, DropoutBase)


def module_family(module: nn.Module) -> str:
    """``layer``, ``norm``, or the canonical operation that a parameterless module stands for."""
    if is_weight_layer(module):
        return "layer"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, _SAME):
        return "identity"
    name = type(module).__name__
    for ours, theirs in (
        ("adaptive_max_pool2d", "AdaptiveMaxPool"),
        ("adaptive_avg_pool2d", "AdaptiveAvgPool"),
        ("max_pool2d", "MaxPool"),
        ("avg_pool2d", "AvgPool"),
        ("flatten", "Flatten"),
        ("unflatten", "Unflatten"),
        ("rearrange", "Rearrange"),
        ("pad", "Pad"),
        ("pixel_shuffle", "PixelShuffle"),
        ("relu", "ReLU"),
    ):
        if theirs in name and name not in ("LeakyReLU", "PReLU", "RReLU", "CReLU"):
            return ours
    return name
