# SPDX-License-Identifier: Apache-2.0
"""Layer by layer against the eager model: every neuron on the input that it has there."""

import functools

import pytest
import torch
from few_rounds import fastest_of, few_rounds
from pack_strategies import prune
from torch import Tensor, nn
from zoo_cases import build, quarter_width

from spikenm_fx.bench import subjects
from spikenm_fx.bench.zoo import Case
from spikenm_fx.pack import native_status, pack, packing
from spikenm_fx.pack.check.forced import forced_mismatch
from spikenm_fx.pack.engine.lazy import LazyTensor, SpikeBits
from spikenm_fx.pattern import NM

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds"]

LIMIT = 1e-4  # share of spikes that may differ
FRAMEWORKS = [
    "snntorch/loop",
    "snntorch/sequential",
    "snntorch/conv",
    "snntorch/synaptic",
    "norse/loop",
    "norse/lift",
    "sinabs/squeeze",
    "spikingjelly/sew_resnet18_and/m",
    "spikingjelly/sew_resnet18/s",
]


@functools.cache
def _network(name: str, nm: str) -> Case:
    """A network that fires, a quarter as wide; packing leaves it as it is."""
    pytest.importorskip("spikingjelly")
    torch.manual_seed(0)
    with quarter_width(f"spikingjelly/{name}"):
        network = subjects.NETWORKS[name]()
    subjects.prune(network.model, NM.parse(nm))
    x = network.inputs(1)
    if name == "sew_resnet18":  # which takes images of any size
        x = x[..., ::2, ::2].contiguous()
    subjects.calibrate_rates(network, x, 0.1)
    return Case(network.model, (x,), network.reset)


@functools.cache
def _small(name: str) -> Case:
    case = build(name)
    for module in case.model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.weight.data = prune(module.weight.data, NM(2, 4))
    return case


def _mismatch(case: Case, engine: nn.Module) -> dict[str, float]:
    for module in (case.model, engine):
        case.reset(module)
    return forced_mismatch(case.model, engine, *case.inputs)


@pytest.mark.framework
@pytest.mark.parametrize(
    ("name", "nm", "backend"),
    [
        *(("spiking_vgg11_bn", "2:4", backend) for backend in ("event", "lut")),
        *(("sew_resnet18", "1:8", backend) for backend in ("auto", "event")),
        *(("vggsnn", "2:4", backend) for backend in ("auto", "lut", "fma")),
    ],
)
def test_deep_networks(name, nm, backend):
    """Fewer than one spike in ten thousand of any neuron differs, whatever backend runs."""
    case = _network(name, nm)
    engine = pack(case.model, case.inputs, backend=backend)
    if backend == "auto":  # of a narrow network, which gains nothing as a whole
        assert max(_mismatch(case, engine).values()) < LIMIT
        engine = pack(case.model, case.inputs, backend=fastest_of(engine))
    found = _mismatch(case, engine)
    fused = [row.neuron for row in packing(engine).layers if row.neuron]
    assert len(fused) >= 8
    assert set(fused) <= set(found)
    assert max(found.values()) < LIMIT


@pytest.mark.parametrize("backend", ["event", "fma"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(name, backend):
    """The same for models of every framework, states carried or hidden, one step or all."""
    case = _small(name)
    engine = pack(case.model, case.inputs, backend=backend)
    found = _mismatch(case, engine)
    assert found
    assert max(found.values()) < LIMIT


@pytest.mark.parametrize("name", ["spikingjelly/sew_resnet18_and/m", "snntorch/conv"])
def test_a_wrong_layer_is_seen_where_it_is(name):
    """Another weight in one layer shows in its neuron, and in no other."""
    case = _small(name)
    engine = pack(case.model, case.inputs, backend="event")
    row = next(row for row in packing(engine).layers if row.neuron)
    changed = engine.get_submodule(row.name)
    shifted = (0 if changed.bias is None else changed.bias) + torch.full((row.shape[0],), 0.5)
    changed.bias = nn.Parameter(shifted, requires_grad=False)
    found = _mismatch(case, engine)
    assert found.pop(row.neuron) > 0.01
    assert max(found.values()) < LIMIT


@pytest.mark.framework
def test_the_model_s_spikes_go_on_as_bits():
    """Layers behind a fused neuron read the forced spikes the way they read its own."""
    case = _network("spiking_vgg11_bn", "2:4")
    engine = pack(case.model, case.inputs, backend="event")
    fused = [row for row in packing(engine).layers if row.neuron]
    seen: dict[str, Tensor] = {}
    for row in fused:
        engine.get_submodule(row.name).register_forward_pre_hook(
            lambda _m, args, name=row.name: seen.update({name: args[0]})
        )
    _mismatch(case, engine)
    bits = [x for x in seen.values() if isinstance(x, LazyTensor)]
    assert len(bits) >= len(fused) - 1  # the first layer reads the image
    assert all(isinstance(x.source, SpikeBits) for x in bits)


def test_only_neurons_are_compared():
    """A model without neurons has nothing to compare."""
    model = nn.Sequential(nn.Linear(8, 8))
    assert forced_mismatch(model, pack(model, torch.rand(2, 8)), torch.rand(2, 8)) == {}
