# SPDX-License-Identifier: Apache-2.0
"""More public repositories, which neither the recipes nor the library's own tests were made with.

Each builder knows how many neuron layers its network really has, counted by reading its code.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikenm_fx.bench.repos import case_of
from spikenm_fx.bench.zoo import Case
from spikenm_fx.recipe.stand_in import stand_in
from spikenm_fx.state import reset_to_rest

__all__ = ["FURTHER", "Further", "build_further"]

_UNUSED = (
    "IPython",
    "brevitas",
    "torchvision",
    "audiozen",
    "librosa",
    "soundfile",
    "joblib",
    "tensorboardX",
    "timm",
    "utilsd",
)

Made = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Further:
    """One network of a repository.

    Attributes:
        repo: ``owner/name``.
        path: where inside it its imports start.
        make: builds the model from the imported modules, with its inputs.
        neurons: how many neuron layers the network has.
        jelly: version of SpikingJelly it needs, "" for what is installed or none.
    """

    repo: str
    path: str
    make: Callable[[], Made]
    neurons: int
    jelly: str = ""


def build_further(name: str, repos: Path) -> Case:
    """Build one network.

    Args:
        name: key of :data:`FURTHER`.
        repos: folder with a checkout of each repository, named as the repository, and with
            ``_site/spikingjelly-VERSION`` for those that need an old one.
    """
    entry = FURTHER[name]
    root = repos / entry.repo.partition("/")[2]
    sys.path.insert(0, str(root / entry.path))
    if entry.jelly:
        sys.path.insert(0, str(repos / "_site" / f"spikingjelly-{entry.jelly}"))
    stand_in(*_UNUSED)
    # their code asks for a GPU where it makes tensors
    cast(Any, Tensor).cuda = lambda self, *_, **__: self
    os.chdir(root / entry.path)
    torch.manual_seed(0)
    return case_of(*entry.make(), reset_to_rest)


def _from(module: str) -> Any:
    return importlib.import_module(module)


def _image(size: int = 32, channels: int = 3) -> tuple[Tensor, ...]:
    return (2 * torch.rand(2, channels, size, size),)


class _Steps(nn.Module):
    """Shows one image at each of several steps, and averages what comes out."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps

    def forward(self, x: Tensor) -> Tensor:
        """The mean of all steps' outputs."""
        return torch.stack([self.net(x) for _ in range(self.steps)]).mean(0)


def _sparch(kind: str) -> Made:
    model = _from("sparch.models.snns").SNN((2, 20, 40), [64, 64, 64, 10], neuron_type=kind)
    return model, (torch.rand(2, 20, 40),)


def _pointnet() -> Made:
    net = _from("models.pointnet_cls").get_model(40)
    model = _from("models.spike_model").SpikeModel(net)
    model.set_spike_state(True)
    return model, (torch.rand(2, 6, 64),)


def _seenn() -> Made:
    return _from("models.resnet").resnet19(num_classes=10, width_mult=1, T=2), _image()


class _Registry(type):
    """Stands for a package that files classes under names."""

    def __new__(mcs, cls: str, bases: Any, space: Any, /, **_: Any) -> Any:
        return super().__new__(mcs, cls, bases, space)

    def __init__(self, cls: str, bases: Any, space: Any, /, **_: Any) -> None:
        super().__init__(cls, bases, space)

    def register_module(cls, *_: Any, **__: Any) -> Callable[[Any], Any]:
        return lambda registered: registered


def _ispikformer() -> Made:
    config = types.ModuleType("utilsd.config")
    config.Registry = _Registry  # type: ignore[attr-defined]
    sys.modules["utilsd.config"] = config
    made = _from("SeqSNN.network.snn.ispikformer").iSpikformer
    model = made(dim=64, depths=2, max_length=24, num_steps=2, heads=4)
    return model, (torch.randn(2, 24, 6),)


def _fullsubnet() -> Made:
    made = _from("recipes.intel_ndns.spiking_fullsubnet.model").SequenceModel
    model = made(32, 64, 2, proj_size=16, shared_weights=True, bn=True)
    return model, (torch.randn(2, 32, 20),)


def _qcfs() -> Made:
    utils, made = _from("utils"), _from("Models.VGG").vgg11()
    made = utils.replace_activation_by_floor(utils.replace_maxpool2d_by_avgpool2d(made), t=4)
    return _Steps(utils.replace_activation_by_neuron(made), 4), _image()


def _qcfs_floor() -> Made:
    utils, made = _from("utils"), _from("Models.VGG").vgg11()
    return utils.replace_activation_by_floor(utils.replace_maxpool2d_by_avgpool2d(made), t=1), (
        _image()
    )


def _bntt() -> Made:
    return _from("model").SNN_VGG9_BNTT(num_steps=3, img_size=32), _image()


def _stbp() -> Made:
    _from("model").steps = _from("setting").STEPS
    return _from("model").MNISTNet(), (torch.rand(2, 1, 28, 28, 2),)


def _qsnn() -> Made:
    config = {"num_bits": None, "threshold": 0.5, "slope": 10, "beta": 0.9, "num_steps": 4}
    model = _from("Net").Net({**config, "batch_norm": True, "dropout": 0.1})
    return model, _image(28, 1)


def _dsr(maker: str) -> Made:
    setting = {
        **{"timesteps": 3, "train_Vth": 1, "Vth": 1.0, "alpha": 0.5, "Vth_bound": 0.01},
        **{"rate_stat": 0, "tau": 1.0, "delta_t": 0.05},
    }
    return getattr(_from("modules.vgg"), maker)(setting), (2 * torch.rand(2, 3, 2, 48, 48),)


def _attention() -> Made:
    return _from("models.resnet_2").resnet18(), _image(64)


def _decolle() -> Made:
    made = _from("decolle.lenet_decolle_model").LenetDECOLLE
    model = made(
        (2, 16, 16), Nhid=[8, 16], Mhid=[32], out_channels=10, kernel_size=[3], pool_size=[2, 2],
        num_conv_layers=2, num_mlp_layers=1, lc_ampl=None,
    )  # fmt: skip
    return model, (torch.bernoulli(torch.full((2, 6, 2, 16, 16), 0.3)),)


def _gated() -> Made:
    setting = {
        **{"gate": [0.6, 0.8, 0.6], "param": [0.25, 0.5, 0.0625, 0.5], "t": 2},
        **{"static_gate": True, "static_param": False, "time_wise": True, "soft_mode": False},
    }
    model = _from("networks_for_CIFAR").ResNet_18_stand(setting, input_size=32, n_class=10)
    return model, _image()


def _repvgg() -> Made:
    model = _from("dst_repvgg").SRepVGG_N0(10)
    _from("spikingjelly.activation_based.functional").set_step_mode(model, "m")
    return model, (2 * torch.rand(1, 2, 2, 64, 64),)


def _detection() -> Made:
    neuron = _from("spikingjelly.clock_driven.neuron").MultiStepParametricLIFNode
    make = _from("models.spiking_vgg").multi_step_spiking_vgg11
    model = make(2, norm_layer=nn.BatchNorm2d, T=2, multi_step_neuron=neuron, num_classes=10)
    return model, (2 * torch.rand(2, 2, 2, 32, 32),)


class _Recurrent(nn.Module):
    """Their recurrent and dense layers, as their scripts chain them; ``x`` is (N, T, 40)."""

    def __init__(self) -> None:
        super().__init__()
        rnn, dense = _from("SRNN_layers.spike_rnn"), _from("SRNN_layers.spike_dense")
        self.first, self.second = rnn.spike_rnn(40, 64), rnn.spike_rnn(64, 64)
        self.third, self.out = dense.spike_dense(64, 64), dense.readout_integrator(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the readout's membranes."""
        layers = self.first, self.second, self.third, self.out
        for each in layers:
            each.set_neuron_state(x.shape[0])
        total = torch.zeros(x.shape[0], 12)
        for step in x.unbind(1):
            spikes = step
            for each in layers[:-1]:
                _, spikes = each(spikes)
            total = total + self.out(spikes)
        return total


def _adaptive() -> Made:
    return _Recurrent(), (torch.rand(2, 12, 40),)


class _Predictive(nn.Module):
    """Their network, handed its state from step to step; ``x`` is (N, T, 64)."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The last step's output."""
        state = self.net.init_hidden(x.shape[0])
        out = None
        for step in x.unbind(1):
            out, state = self.net(step, state)
        return cast(Tensor, out)


def _predictive() -> Made:
    made = _from("scripts.network_class").SnnNetwork
    net = made(64, [64, 32], 10, is_adapt=True, one_to_one=True, dp_rate=0.0, is_rec=False)
    return _Predictive(net), (torch.rand(2, 6, 64),)


def _forecaster() -> Made:
    made = _from("models.SpikTCN").SpikeTCN
    return made(24, 3, 2, 6, 12, 2.0, 32), (torch.randn(2, 24, 6),)


def _dendritic() -> Made:
    """Two layers of their dendritic neurons of two compartments, as their test chains them."""
    layer, functional, surrogate = (
        _from(f"spikingjelly.activation_based.{name}")
        for name in ("layer", "functional", "surrogate")
    )
    part, dend, neuron, soma, wiring = (
        _from(f"dendsn.model.{name}")
        for name in ("dend_compartment", "dendrite", "neuron", "soma", "wiring")
    )

    def fires(somas: int) -> nn.Module:
        tree = dend.SegregatedDend(
            part.PassiveDendCompartment(decay_input=False), wiring.SegregatedDendWiring(2)
        )
        body = soma.LIFSoma(surrogate_function=surrogate.Sigmoid())
        strength: Any = {"forward_strength": [1.0, 1.0], "forward_strength_learnable": True}
        return cast(nn.Module, neuron.VDiffForwardDendNeuron(tree, body, [somas], **strength))

    linear = layer.Linear
    model = nn.Sequential(linear(40, 128), fires(64), linear(64, 64), fires(32), linear(32, 10))
    functional.set_step_mode(model, "m")
    return model, (4 * torch.rand(6, 2, 40),)


FURTHER: dict[str, Further] = {
    "sparch_radlif": Further("idiap/sparch", "", partial(_sparch, "RadLIF"), 3),
    "spiking_pointnet": Further("DayongRen/Spiking-PointNet", "", _pointnet, 14),
    "seenn_resnet19": Further("Intelligent-Computing-Lab-Yale/SEENN", "", _seenn, 17),
    "seqsnn_ispikformer": Further("microsoft/SeqSNN", "", _ispikformer, 16, "0.0.0.0.14"),
    "spiking_fullsubnet": Further("haoxiangsnr/spiking-fullsubnet", "", _fullsubnet, 2),
    "qcfs_vgg11": Further("putshua/SNN_conversion_QCFS", "", _qcfs, 10),
    "qcfs_vgg11_floor": Further("putshua/SNN_conversion_QCFS", "", _qcfs_floor, 10),
    "bntt_vgg9": Further(
        "Intelligent-Computing-Lab-Yale/BNTT-Batch-Normalization-Through-Time", "", _bntt, 9
    ),  # eight and the encoder, which turns pixels into spikes at random
    "stbp_simple": Further("thiswinex/STBP-simple", "", _stbp, 1),
    "qsnn_fmnist": Further("jeshraghian/QSNNs", "fmnist", _qsnn, 3),
    "dsr_vgg11_if": Further("qymeng94/DSR", "cifar", partial(_dsr, "vgg11_if"), 9),
    "dsr_vgg11_lif": Further("qymeng94/DSR", "cifar", partial(_dsr, "vgg11_lif"), 9),
    "attention_resnet18": Further("BICLab/Attention-SNN", "Att_Res_SNN", _attention, 17),
    "decolle_lenet": Further("nmi-lab/decolle-public", "", _decolle, 3),
    "gated_lif_resnet18": Further("Ikarosy/Gated-LIF", "", _gated, 17, "0.0.0.0.12"),
    "spiking_repvgg": Further(
        "alexandercrantell/Spiking-RepVGG", "cifar10dvs", _repvgg, 19, "0.0.0.0.14"
    ),
    "detection_vgg11": Further(
        "loiccordone/object-detection-with-spiking-neural-networks", "", _detection, 9,
        "0.0.0.0.12",
    ),
    "adaptive_srnn": Further("byin-cwi/Efficient-spiking-networks", "GSC", _adaptive, 3),
    "spiking_pc": Further("lucyzmf/spikingPC", "", _predictive, 2),
    "spiking_tcn": Further("spikora/SpikingTSF", "", _forecaster, 7),
    "dendritic": Further("AllenYolk/dendritic-spiking-neuron", "", _dendritic, 2, "0.0.0.0.14"),
}  # fmt: skip
"""The networks, by name."""
