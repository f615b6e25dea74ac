# SPDX-License-Identifier: Apache-2.0
"""Networks from public repositories' own code, built from a folder of checkouts.

Their modules share names (``model``, ``models.layers``), so each is built in a process of its own.
GPU-only kernels are set to the frameworks' torch backends; nothing else of their code is changed.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikenm_fx.bench.livening import liven
from spikenm_fx.bench.zoo import Case
from spikenm_fx.recipe.rwkv import wkv
from spikenm_fx.recipe.stand_in import stand_in

__all__ = ["REPOS", "Checkout", "build", "case_of"]

_UNUSED = (
    "torchvision",
    "torchinfo",
    "tensorboard",
    "deepspeed",
    "cv2",
    "tonic",
    "mmengine",
)


@dataclass(frozen=True, slots=True)
class Checkout:
    """Where one network is and how it is built.

    Attributes:
        folder: the repository's name.
        path: where inside it its imports start.
        make: builds the model from the imported modules; returns it with its inputs.
        jelly: version of SpikingJelly it needs, "" for none.
        scripted: whether torch's script compiler runs what the repository scripts.
    """

    folder: str
    path: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    jelly: str = ""
    scripted: bool = False


def build(name: str, repos: Path, sites: Path | None) -> Case:
    """Build one network.

    Args:
        name: key of :data:`REPOS`.
        repos: folder with a checkout of each repository, named as the repository.
        sites: folder with old SpikingJelly releases, ``spikingjelly-0.0.0.0.12`` and so on.
    """
    checkout = REPOS[name]
    sys.path.insert(0, str(repos / checkout.folder / checkout.path))
    if checkout.jelly and sites is not None:
        sys.path.insert(0, str(sites / f"spikingjelly-{checkout.jelly}"))
    stand_in(*_UNUSED)
    _timm_names()
    _torch_backends(checkout.jelly)
    torch.manual_seed(0)
    return case_of(*checkout.make(), reset)


def case_of(
    model: nn.Module, inputs: tuple[Tensor, ...], reset: Callable[[nn.Module], None]
) -> Case:
    """A model of a checkout, on torch's operations and firing.

    Args:
        model: as its code builds it; changed in place.
        inputs: of one forward, in the shapes that it takes.
        reset: forgets its state.
    """
    for module in nn.Module.modules(model):
        if hasattr(module, "backend"):
            cast(Any, module).backend = "torch"
    return Case(liven(model, inputs, reset), inputs, reset)


def reset(model: nn.Module) -> None:
    """Forget the state of every neuron, whatever release of a framework it is from."""
    for module in nn.Module.modules(model):
        call: Any = getattr(module, "reset", None)
        if callable(call) and (not list(module.children()) or hasattr(module, "_memories")):
            call()


def _timm_names() -> None:
    """Older code decorates with a registry that newer releases have renamed."""
    for name in ("timm.models.registry", "timm.models.layers", "timm.models.vision_transformer"):
        try:
            importlib.import_module(name)
        except ImportError:
            stand_in("timm")


def _torch_backends(version: str) -> None:
    """Let neurons be constructed with ``backend="cupy"`` where there is none."""
    if version.endswith("12"):
        neuron = importlib.import_module("spikingjelly.clock_driven.neuron")
        neuron.check_backend = lambda *_: None  # type: ignore[attr-defined]
        package = types.ModuleType("spikingjelly.cext")
        package.neuron = neuron  # type: ignore[attr-defined]
        sys.modules["spikingjelly.cext"] = package
        sys.modules["spikingjelly.cext.neuron"] = neuron
    elif version.endswith("14"):
        base = importlib.import_module("spikingjelly.activation_based.base")
        cast(Any, base).check_backend_library = lambda *_: None
        cast(Any, base).StepModule.supported_backends = ("torch", "cupy")


def _from(module: str) -> Any:
    return importlib.import_module(module)


def _image(size: int = 32, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.rand(2, channels, size, size) * 2,)


def _shape(size: int, patch: int) -> dict[str, int]:
    sizes = {"img_size_h": size, "img_size_w": size, "patch_size": patch}
    return {**sizes, "in_channels": 3, "num_classes": 10}


def _transformer(module: str, maker: str, **other: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    settings = {
        **{
            "img_size_h": 32,
            "img_size_w": 32,
            "patch_size": 4,
            "in_channels": 3,
            "num_classes": 10,
        },
        **{"embed_dims": 64, "num_heads": 4, "mlp_ratios": 4, "depths": 2, "sr_ratios": 1, "T": 4},
        **other,
    }
    return getattr(_from(module), maker)(**settings), _image()


def _sdt_v1() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = _from("model.spikeformer").sdt(
        **{
            "img_size_h": 64,
            "img_size_w": 64,
            "in_channels": 3,
            "num_classes": 10,
            "embed_dims": 64,
        },
        **{"num_heads": 4, "mlp_ratios": 4, "depths": 2, "T": 2},
    )
    return model, _image(64)


def _meta(maker: str, width: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = getattr(_from("models"), maker)(
        **{
            "img_size_h": 64,
            "img_size_w": 64,
            "patch_size": 16,
            "in_channels": 3,
            "num_classes": 10,
        },
        **{"embed_dim": list(width), "num_heads": 8, "mlp_ratios": 4, "depths": 8, "sr_ratios": 1},
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return model, _image(64)


def _sdt_v2_full() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _from("models").metaspikformer_8_384(), _image(224)


def _resformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    models = _from("models.spikingresformer")
    return models.spikingresformer_cifar(T=2, num_classes=10), _image()


def _sew() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _from("sew_resnet").sew_resnet18(T=2, connect_f="ADD", num_classes=10), _image(64)


def _tet_resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = _from("models.resnet_models").resnet19(num_classes=10)
    model.T = 2
    return model, _image()


def _tet_vgg() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _from("models.VGG_models").VGGSNN(), (torch.rand(1, 2, 2, 48, 48) * 2,)


def _lth() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _from("archs.cifarsvhn.resnet").ResNet19(10, 2), _image()


def _nda() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = _from("models.VGG_models").vgg11(in_c=2)
    return model, (torch.rand(1, 2, 2, 48, 48) * 2,)


class _FirstStep(nn.Module):
    """OTTT's networks are told by keyword that a sequence begins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """The first step of a sequence."""
        return self.model(x, init=True)


def _ottt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    neuron = _from("modules.neuron").OnlineLIFNode
    surrogate = _from("modules.surrogate").Sigmoid()
    model = _from("models.spiking_vgg").online_spiking_vgg11_ws(
        single_step_neuron=neuron,
        **{"tau": 2.0, "surrogate_function": surrogate, "track_rate": True, "num_classes": 10},
        **{"c_in": 3, "fc_hw": 1, "v_reset": None},
    )
    return _FirstStep(model), _image()


def _gpt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    _from("torch.utils.cpp_extension").load = lambda **_: None
    _from("src.spikingjelly.clock_driven.neuron").check_backend = lambda *_: None
    module = _from("src.model")
    module.RUN_CUDA = wkv
    config = module.GPTConfig(50, 16, model_type="RWKV", n_layer=2, n_embd=32)
    return module.GPT(config), tuple(torch.randint(0, 50, (2, 2, 8)))


REPOS: dict[str, Checkout] = {
    "spikformer": Checkout(
        "spikformer", "cifar10", partial(_transformer, "model", "spikformer"), "0.0.0.0.12"
    ),
    "spikingformer": Checkout(
        "Spikingformer", "cifar10", partial(_transformer, "model", "Spikingformer"), "0.0.0.0.12"
    ),
    "qkformer": Checkout(
        "QKFormer", "cifar10", partial(_transformer, "model", "QKFormer"), "0.0.0.0.12"
    ),
    "sdt_v1": Checkout("Spike-Driven-Transformer", "", _sdt_v1, "0.0.0.0.12"),
    "sdt_v2": Checkout(
        "Spike-Driven-Transformer-V2",
        "classification",
        partial(_meta, "Spiking_vit_MetaFormer", (32, 64, 128, 160)),
        "0.0.0.0.12",
    ),
    "sdt_v2_8_384": Checkout(
        "Spike-Driven-Transformer-V2", "classification", _sdt_v2_full, "0.0.0.0.12"
    ),
    "sdt_v3": Checkout(
        "Spike-Driven-Transformer-V3",
        "SDT_V3/Classification/Model_Base",
        partial(_meta, "Spiking_vit_MetaFormer_Spike_SepConv", (24, 48, 96, 128)),
    ),
    "spikingresformer": Checkout("SpikingResformer", "", _resformer, "0.0.0.0.14"),
    "sew_resnet18": Checkout("Spike-Element-Wise-ResNet", "imagenet", _sew, "0.0.0.0.12"),
    "tet_resnet19": Checkout("temporal_efficient_training", "", _tet_resnet),
    "tet_vggsnn": Checkout("temporal_efficient_training", "", _tet_vgg),
    "lth_resnet19": Checkout("Exploring-Lottery-Ticket-Hypothesis-in-SNNs", "", _lth, "0.0.0.0.12"),
    "nda_vgg11": Checkout("NDA_SNN", "", _nda),
    "ottt_vgg11_ws": Checkout("OTTT-SNN", "", _ottt),
    "spikegpt": Checkout("SpikeGPT", "", _gpt),
    "spikegpt_jit": Checkout("SpikeGPT", "", _gpt, scripted=True),
}
"""The networks, by name."""
