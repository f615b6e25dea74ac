# SPDX-License-Identifier: Apache-2.0
"""The custom operators under opcheck, torch.compile and torch.export."""

import pytest
import torch
from pack_strategies import prune
from torch import nn

from spikenm_fx.native.library import KERNELS, available_kernels
from spikenm_fx.pack import LayerGeometry, PackedLayer, native_status, pack_weight
from spikenm_fx.pack.engine.neuron import NeuronRule
from spikenm_fx.pack.kernels.ops import geometry_list, integrate, sparse_layer
from spikenm_fx.pattern import NM
from spikenm_fx.trace import NeuronSpec

pytestmark = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")


def _layer(kernel: str, spatial: int) -> tuple[PackedLayer, torch.Tensor]:
    geometry = LayerGeometry.conv(spatial, padding=1) if spatial else LayerGeometry()
    weight = prune(torch.randn(24, 40, *[3] * spatial), NM(2, 4))
    dtype = torch.int8 if kernel.endswith("8") else None
    packed = pack_weight(weight, "2:4", geometry=geometry, dtype=dtype)
    x = (torch.rand(3, 40, *[7] * spatial) < 0.3).float()
    return PackedLayer(packed, torch.randn(24), choice=kernel), x


@pytest.mark.slow
@pytest.mark.parametrize("kernel", available_kernels())
@pytest.mark.parametrize("spatial", [0, 1, 2])
def test_opcheck_sparse_layer(kernel, spatial):
    """Schema, fake kernel and dispatch of the layer operator are what torch demands."""
    layer, x = _layer(kernel, spatial)
    layout = layer.layout()
    arguments = (
        *(x, layout.weights, layout.codes, layout.blocks, layout.scale),
        *(layer.values, layer.indices, layer.scale, layer.bias),
        *(list(layer.weight_shape), geometry_list(layer.geometry), [2, 4]),
        *(KERNELS.index(kernel), layout.kind),
    )
    torch.library.opcheck(sparse_layer, arguments)
    if spatial == 2:
        last = x.to(memory_format=torch.channels_last)
        torch.library.opcheck(sparse_layer, (last, *arguments[1:]))


def test_opcheck_integrate():
    """The same for the neuron operator, which returns new state instead of changing it."""
    rule = NeuronRule.of(NeuronSpec("x", "LIF", exact=True, decay=0.5), 64)
    v = torch.rand(5, 64)
    torch.library.opcheck(integrate, (torch.rand(3, 5, 64), v, rule.parameters, rule.modes()))


@pytest.mark.parametrize("kernel", ["event", "fma"])
def test_compiles_without_a_break(kernel):
    """torch.compile(fullgraph=True) sees through packed layers, and export keeps the operator."""
    conv, x = _layer(kernel, 2)
    net = nn.Sequential(conv, nn.ReLU()).eval()
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(net, (x,))
    assert any("sparse_layer" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), expected)


def test_analog_input_is_rerouted():
    """The operator gives the exact dense result where a spike kernel declines."""
    layer, x = _layer("event", 2)
    analog = x + 0.25
    expected = torch.nn.functional.conv2d(analog, layer.weight, layer.bias, padding=1)
    assert torch.allclose(layer._compiled(analog), expected, atol=1e-6)
