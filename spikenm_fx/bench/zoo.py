# SPDX-License-Identifier: Apache-2.0
"""Spiking models from the frameworks' own code, small, with inputs that make them spike.

Each entry is built on demand; its framework is imported only then.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikenm_fx.bench.livening import liven, rouse
from spikenm_fx.bench.nets import handwritten
from spikenm_fx.recipe.stand_in import stand_in

__all__ = ["BRAINCOG_NEVER_USES", "RUNNING", "ZOO", "Case", "Entry"]


@dataclass(frozen=True, slots=True)
class Case:
    """A built model with what a call needs.

    Attributes:
        model: in eval mode, with norms set so that spikes reach its last layers.
        inputs: positional arguments of a call.
        reset: forgets the model's state.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    reset: Callable[[nn.Module], None]

    def run(self) -> Any:
        """One forward; on copies, as some models write into their input."""
        return self.model(*(x.clone() for x in self.inputs))


@dataclass(frozen=True, slots=True)
class Entry:
    """How to build one model.

    Attributes:
        framework: name of the package that must be importable; "" for hand-written ones.
        build: makes the case.
        refuses: what the framework's own error says where its model cannot run this way; "" for
            those that run.
    """

    framework: str
    build: Callable[[], Case]
    refuses: str = ""

    @property
    def available(self) -> bool:
        """Whether the framework is installed."""
        return not self.framework or importlib.util.find_spec(self.framework) is not None


def _no_reset(model: nn.Module) -> None:
    """Models whose forward starts from a fresh state by itself."""


# -- SpikingJelly ---------------------------------------------------------------------------------


def _jelly_reset(model: nn.Module) -> None:
    importlib.import_module("spikingjelly.activation_based.functional").reset_net(model)


def _jelly(
    file: str, maker: str, shape: tuple[int, ...], mode: str, runs: bool, kwargs: dict[str, Any]
) -> Callable[[], Case]:
    def build() -> Case:
        stand_in("torchvision")
        torch.manual_seed(0)
        base = "spikingjelly.activation_based"
        models = importlib.import_module(f"{base}.model.{file}")
        neuron = importlib.import_module(f"{base}.neuron")
        functional = importlib.import_module(f"{base}.functional")
        model = getattr(models, maker)(**{"spiking_neuron": neuron.LIFNode, **kwargs})
        functional.set_step_mode(model, mode)
        x = torch.rand(*(shape if mode == "m" else shape[1:])) * 2
        for module in nn.Module.modules(model):
            if isinstance(module, nn.Linear):
                module.weight.data *= 4.0  # no norm follows
        if not runs:
            return Case(model.eval(), (x,), _jelly_reset)
        return Case(liven(model, (x,), _jelly_reset), (x,), _jelly_reset)

    return build


_M_ONLY = "Expected 3D .* or 4D .* input to conv2d"
"""SpikingJelly's transformers add the time axis themselves: their layers must know of it ('m')."""
_TINY: dict[str, Any] = {"num_classes": 10, "T": 2}
_JELLY: dict[str, tuple[str, str, tuple[int, ...], str, dict[str, Any]]] = {
    "spiking_resnet18": ("spiking_resnet", "spiking_resnet18", (2, 2, 3, 32, 32), "sm", {}),
    "sew_resnet18": ("sew_resnet", "sew_resnet18", (2, 2, 3, 32, 32), "sm", {"cnf": "ADD"}),
    "sew_resnet18_and": ("sew_resnet", "sew_resnet18", (2, 2, 3, 32, 32), "sm", {"cnf": "AND"}),
    "sew_resnet18_iand": ("sew_resnet", "sew_resnet18", (2, 2, 3, 32, 32), "sm", {"cnf": "IAND"}),
    "sew_resnet50": ("sew_resnet", "sew_resnet50", (2, 2, 3, 32, 32), "sm", {"cnf": "ADD"}),
    "ms_resnet18": ("ms_resnet", "ms_resnet18", (2, 2, 3, 32, 32), "m", _TINY),
    "spiking_vgg11_bn": ("spiking_vgg", "spiking_vgg11_bn", (2, 2, 3, 32, 32), "sm", {}),
    "cifar10dvs": (
        "parametric_lif_net",
        "CIFAR10DVSNet",
        (2, 1, 2, 128, 128),
        "sm",
        {"channels": 16},
    ),
    "dvs_gesture": (
        "parametric_lif_net",
        "DVSGestureNet",
        (2, 1, 2, 128, 128),
        "sm",
        {"channels": 16},
    ),
    "spikformer": (
        "spikformer",
        "Spikformer",
        (2, 2, 3, 32, 32),
        "sm",
        {
            **_TINY,
            "img_size_h": 32,
            "img_size_w": 32,
            "patch_size": 4,
            "embed_dims": 64,
            "num_heads": 4,
            "depths": 2,
        },
    ),
    "sdt": (
        "spike_driven_transformer",
        "SpikeDrivenTransformer",
        (2, 2, 3, 64, 64),
        "m",
        {**_TINY, "embed_dims": 64, "num_heads": 4, "depths": 2},
    ),
    "qkformer": (
        "qkformer",
        "QKFormer",
        (2, 2, 3, 64, 64),
        "m",
        {**_TINY, "embed_dims": 64, "num_heads": (2, 4, 4), "depths": (1, 1, 1)},
    ),
    "maxformer": (
        "maxformer",
        "MaxFormer",
        (2, 2, 3, 64, 64),
        "m",
        {**_TINY, "embed_dims": 96, "depths": (1, 1, 1)},
    ),
}


# -- snnTorch -------------------------------------------------------------------------------------


def _snntorch(name: str) -> Callable[[], Case]:
    def build() -> Case:
        torch.manual_seed(0)
        from spikenm_fx.bench.nets import snntorch_nets

        model, x = snntorch_nets.make(name)
        reset = snntorch_nets.reset
        return Case(rouse(model.eval(), (x,), reset), (x,), reset)

    return build


# -- Norse ----------------------------------------------------------------------------------------


def _norse(name: str) -> Callable[[], Case]:
    def build() -> Case:
        stand_in("torchvision", "tensorboard", "nirtorch")
        torch.manual_seed(0)
        from spikenm_fx.bench.nets import norse_nets

        model, x = norse_nets.make(name)
        return Case(model.eval(), (x,), _no_reset)

    return build


# -- sinabs, rockpool, BrainCog -------------------------------------------------------------------


def _sinabs_reset(model: nn.Module) -> None:
    layer = importlib.import_module("sinabs.layers").StatefulLayer
    for module in nn.Module.modules(model):
        if isinstance(module, layer):  # recurrent ones hold a layer of their own
            module.reset_states()


def _sinabs_from_model() -> Case:
    torch.manual_seed(0)
    sinabs = importlib.import_module("sinabs.from_torch")
    ann = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 10, bias=False),
        nn.ReLU(),
    )
    model = sinabs.from_model(ann, batch_size=2, input_shape=(2, 8, 8)).spiking_model
    x = torch.rand(2 * 4, 2, 8, 8).round() * 3
    return Case(rouse(model.eval(), (x,), _sinabs_reset), (x,), _sinabs_reset)


def _sinabs_squeeze() -> Case:
    torch.manual_seed(0)
    layers = importlib.import_module("sinabs.layers")
    activation = importlib.import_module("sinabs.activation")
    single = {"spike_fn": activation.SingleSpike, "batch_size": 2}
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        layers.IAFSqueeze(**single),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        layers.LIFSqueeze(tau_mem=5.0, norm_input=False, **single),
        nn.Flatten(),
        nn.Linear(12 * 16, 10, bias=False),
        layers.ExpLeakSqueeze(tau_mem=5.0, batch_size=2),
    )
    return Case(model.eval(), (torch.rand(2 * 4, 2, 8, 8).round() * 3,), _sinabs_reset)


def _sinabs_recurrent() -> Case:
    torch.manual_seed(0)
    layers = importlib.import_module("sinabs.layers")
    model = nn.Sequential(
        nn.Linear(6, 12),
        layers.LIFRecurrent(tau_mem=5.0, rec_connect=nn.Linear(12, 12), norm_input=False),
        nn.Linear(12, 4),
        layers.IAF(),
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:  # excitation: spikes reach the end, and each other
            parameter.data.abs_()
    return Case(model.eval(), (torch.rand(2, 5, 6) * 4,), _sinabs_reset)


def _rockpool() -> Case:
    torch.manual_seed(0)
    modules = importlib.import_module("rockpool.nn.modules")
    combinators = importlib.import_module("rockpool.nn.combinators")
    model = combinators.Sequential(
        modules.LinearTorch((6, 12)),
        modules.LIFTorch(12),
        modules.LinearTorch((12, 4)),
        modules.LIFTorch(4),
    )
    return Case(model.eval(), (torch.rand(2, 5, 6) * 4,), _rockpool_reset)


def _rockpool_reset(model: nn.Module) -> None:
    cast(Any, model).reset_state()


BRAINCOG_NEVER_USES = (
    "timm",
    "torchvision",
    "tonic",
    "seaborn",
    "pandas",
    "dv",
    "cv2",
    "PIL",
    "sklearn",
    "skimage",
    "h5py",
)


def _braincog(layer_by_layer: bool) -> Callable[[], Case]:
    def build() -> Case:
        stand_in(*BRAINCOG_NEVER_USES)
        torch.manual_seed(0)
        resnet = importlib.import_module("braincog.model_zoo.resnet")
        node = importlib.import_module("braincog.base.node.node")
        model = resnet.resnet18(
            num_classes=10,
            step=2,
            node_type=node.LIFNode,
            layer_by_layer=layer_by_layer,
            dataset="cifar10",
        )
        for module in nn.Module.modules(model):
            if isinstance(module, node.BaseNode):
                module.step = 2  # the network does not pass its own on
        x = torch.rand(2, 3, 32, 32) * 2
        return Case(liven(model, (x,), _no_reset), (x,), _no_reset)

    return build


def _hand(name: str) -> Callable[[], Case]:
    def build() -> Case:
        torch.manual_seed(0)
        model, x = handwritten.make(name)
        return Case(model.eval(), (x,), handwritten.reset)

    return build


def _entries() -> dict[str, Entry]:
    entries = {}
    for name, (file, maker, shape, modes, kwargs) in _JELLY.items():
        for mode in "sm":
            runs = mode in modes
            built = _jelly(file, maker, shape, mode, runs, kwargs)
            refuses = "" if runs else _M_ONLY
            entries[f"spikingjelly/{name}/{mode}"] = Entry("spikingjelly", built, refuses)
    for name in ("loop", "sequential", "rleaky", "synaptic", "conv"):
        entries[f"snntorch/{name}"] = Entry("snntorch", _snntorch(name))
    for name in ("sequential", "loop", "lift", "recurrent"):
        entries[f"norse/{name}"] = Entry("norse", _norse(name))
    entries["sinabs/from_model"] = Entry("sinabs", _sinabs_from_model)
    entries["sinabs/squeeze"] = Entry("sinabs", _sinabs_squeeze)
    entries["sinabs/recurrent"] = Entry("sinabs", _sinabs_recurrent)
    entries["rockpool/lif"] = Entry("rockpool", _rockpool)
    entries["braincog/resnet18/s"] = Entry("braincog", _braincog(False))
    entries["braincog/resnet18/m"] = Entry("braincog", _braincog(True))
    for name in handwritten.NAMES:
        entries[f"hand/{name}"] = Entry("", _hand(name))
    return entries


ZOO: dict[str, Entry] = _entries()
"""The models, by name: framework, network, and step mode where there are two."""
RUNNING: tuple[str, ...] = tuple(name for name, entry in ZOO.items() if not entry.refuses)
"""Those that run; the others are listed because the framework refuses them."""
