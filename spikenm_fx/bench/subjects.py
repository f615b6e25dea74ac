# SPDX-License-Identifier: Apache-2.0
"""The spiking networks that are measured whole: pruned, and calibrated to a firing rate."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import BatchNormBase
from spikenm_fx.pattern import NM, BlockView, is_weight_layer
from spikenm_fx.recipe.stand_in import stand_in
from spikenm_fx.trace import find_neurons

__all__ = ["NETWORKS", "Network", "calibrate_rates", "prune", "spikes_from_rest"]

STEPS = 4


@dataclass(frozen=True, slots=True)
class Network:
    """A model, its inputs by batch size, and how it forgets its state."""

    model: nn.Module
    inputs: Callable[[int], Tensor]
    reset: Callable[[nn.Module], None]


def _jelly(name: str) -> Any:
    return importlib.import_module(f"spikingjelly.activation_based.{name}")


def _reset(model: nn.Module) -> None:
    _jelly("functional").reset_net(model)


def _images(*size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.rand(1, batch, *size).repeat(STEPS, 1, *[1] * len(size))


def _vgg11() -> Network:
    stand_in("torchvision")
    model = _jelly("model.spiking_vgg").spiking_vgg11_bn(
        spiking_neuron=_jelly("neuron").LIFNode, num_classes=10
    )
    # The CIFAR shape of this network: 32 x 32 leaves one pixel before the classifier.
    layer = _jelly("layer")
    model.avgpool = layer.AdaptiveAvgPool2d((1, 1))
    model.classifier = nn.Sequential(layer.Linear(512, 10))
    return _multi_step(model, _images(3, 32, 32))


def _sew_resnet18() -> Network:
    stand_in("torchvision")
    model = _jelly("model.sew_resnet").sew_resnet18(
        spiking_neuron=_jelly("neuron").LIFNode, num_classes=10, cnf="ADD"
    )
    layer = _jelly("layer")
    model.conv1 = layer.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return _multi_step(model, _images(3, 32, 32))


def _vggsnn() -> Network:
    """The plain VGG of temporal efficient training, two input channels of events at 48 x 48."""
    layer, neuron = _jelly("layer"), _jelly("neuron")
    blocks: list[nn.Module] = []
    channels = 2
    for width in (64, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            blocks.append(layer.AvgPool2d(2))
            continue
        blocks += [
            layer.Conv2d(channels, width, 3, padding=1),
            layer.BatchNorm2d(width),
            neuron.LIFNode(tau=2.0, decay_input=False),
        ]
        channels = int(width)
    blocks += [layer.Flatten(), layer.Linear(512 * 9, 10)]
    return _multi_step(nn.Sequential(*blocks), _events)


def _events(batch: int) -> Tensor:
    return (torch.rand(STEPS, batch, 2, 48, 48) < 0.1).float()


def _spikformer() -> Network:
    stand_in("torchvision")
    model = _jelly("model.spikformer").Spikformer(
        T=STEPS,
        num_classes=10,
        img_size_h=32,
        img_size_w=32,
        patch_size=4,
        embed_dims=256,
        num_heads=8,
        depths=4,
    )
    return _multi_step(model, _images(3, 32, 32))


def _multi_step(model: nn.Module, inputs: Callable[[int], Tensor]) -> Network:
    _jelly("functional").set_step_mode(model, "m")
    return Network(model.eval(), inputs, _reset)


NETWORKS: dict[str, Callable[[], Network]] = {
    "spiking_vgg11_bn": _vgg11,
    "sew_resnet18": _sew_resnet18,
    "spikformer-4-256": _spikformer,
    "vggsnn": _vggsnn,
}
"""SpikingJelly's networks in CIFAR shape, and the VGG of TET."""


def prune(model: nn.Module, nm: NM, *, every: bool = False) -> None:
    """Magnitude masks on every layer but the first (analog input) and the last (classifier).

    Args:
        model: changed in place.
        nm: the pattern; layers whose input channels it does not divide stay as they are.
        every: these two layers as well: of networks whose input is spikes.
    """
    layers = [m for m in model.modules() if is_weight_layer(m)]
    for module in layers if every else layers[1:-1]:
        weight: Any = module.weight
        if weight.shape[1] % nm.of:
            continue
        view = BlockView.of_layer(module, nm)
        blocks = view.to_blocks(weight.data)
        mask = torch.zeros_like(blocks)
        mask.scatter_(1, blocks.abs().topk(nm.keep, dim=1).indices, 1.0)
        weight.data = view.from_blocks(blocks * mask)


def calibrate_rates(network: Network, x: Tensor, rate: float) -> dict[str, Any]:
    """Set norms, layer by layer from the input, so that every neuron behind one fires at ``rate``.

    Fresh deep networks are silent, trained ones are not.  In one forward, each batch norm takes
    the statistics of what reaches it, and its shift the value at which the next neuron, tried
    alone, has the rate.

    Args:
        network: model and reset.
        x: an input of the network's own shape.
        rate: share of the neurons that fire at each time step.

    Returns:
        The mean rate and the rate of each neuron.
    """
    waiting: list[Any] = []

    def statistics_of(norm: Any, args: Any) -> None:
        axis = args[0].shape.index(norm.num_features, 1 if args[0].dim() < 5 else 2)
        flat = args[0].movedim(axis, 0).flatten(1)
        norm.running_mean.copy_(flat.mean(1))
        norm.running_var.copy_(flat.var(1) + 1e-4)
        norm.weight.data.fill_(1.0)
        norm.bias.data.zero_()
        waiting.append(norm)

    def shift_for(neuron: Any, args: Any) -> Any:
        if not waiting:
            return None
        norm = waiting.pop()
        shift = _shift_at(network, neuron, args[0], rate)
        norm.bias.data.fill_(shift)
        return (args[0] + shift, *args[1:])

    neurons = [network.model.get_submodule(name) for name in find_neurons(network.model)]
    norms = [m for m in network.model.modules() if isinstance(m, BatchNormBase)]
    hooks = [norm.register_forward_pre_hook(statistics_of) for norm in norms]
    hooks += [neuron.register_forward_pre_hook(shift_for) for neuron in neurons]
    network.reset(network.model)
    with torch.no_grad():
        network.model(x)
    for hook in hooks:
        hook.remove()
    network.reset(network.model)
    return rates_of(network, x)


def _shift_at(network: Network, neuron: nn.Module, x: Tensor, rate: float) -> float:
    """What to add to ``x`` for the neuron to fire at ``rate``, by bisection."""
    alone = copy.deepcopy(neuron)
    alone._forward_pre_hooks.clear()
    low, high = -8.0, 8.0
    for _ in range(14):
        middle = (low + high) / 2
        network.reset(alone)
        if float(alone(x + middle).mean()) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def rates_of(network: Network, x: Tensor) -> dict[str, Any]:
    """Mean firing rate, and that of each neuron layer, on ``x`` of the network's input shape."""
    _, spikes = spikes_from_rest(network, network.model, x)
    rates = {name: float(value.mean()) for name, value in spikes.items()}
    return {"mean": sum(rates.values()) / max(1, len(rates)), "neurons": rates}


def spikes_from_rest(
    network: Network, model: nn.Module, x: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output from rest on ``x`` of the network's input shape, and the spikes of every neuron."""
    spikes: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            spikes[name] = out + 0.0

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(keep(name))
        for name in find_neurons(network.model)
    ]
    network.reset(model)
    with torch.no_grad():
        output = model(x)
    for hook in hooks:
        hook.remove()
    network.reset(model)
    return output, spikes
