# SPDX-License-Identifier: Apache-2.0
"""Unfolded models in the hands of other tools, which copy layers, count weights and share data."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from loops import OverTime, heard, masks, same, sequences, sparse_spiking, step_of, train
from strategies import ALL_LAYERS, batches, network
from torch import Tensor, nn

import spikenm_fx


def trained() -> nn.Module:
    model = sparse_spiking()
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), sequences(4))
    return model.eval()


# -- neurobench 2.3.0 counts on binarised deep copies of layers ----------------------------------


def binarised(tensor: Tensor, all_ones: bool) -> Tensor:
    tensor = tensor.clone()
    tensor[tensor != 0] = 1
    if all_ones:
        tensor[tensor == 0] = 1
    return tensor


def operations(layer: nn.Module, inputs: Tensor, *, total: bool = False) -> int:
    """Synaptic operations of one call, by neurobench's steps: copy, write ``weight.data``, run."""
    copied = copy.deepcopy(layer)
    copied.weight.data = binarised(copied.weight.data, total)
    if layer.bias is not None:
        copied.bias.data = binarised(copied.bias.data, total)
        copied.bias.data = torch.zeros_like(copied.bias.data)
    return int(copied(binarised(inputs, total)).sum())


def counts(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Operations of each linear layer, counted after the forward pass as its hooks do."""
    seen: list[tuple[str, nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda layer, args, name=name: seen.append((name, layer, args[0]))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {
        name: (operations(layer, inputs), operations(layer, inputs, total=True))
        for name, layer, inputs in seen
    }


def zeros(model: nn.Module) -> float:
    """Connection sparsity: share of zeros that leaf modules show under ``weight``."""
    leaves = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(int((m.weight == 0).sum()) for m in leaves) / sum(m.weight.numel() for m in leaves)


def test_operations_counted_on_copies_are_those_of_the_folded_model() -> None:
    """Effective operations, dense ones and connection sparsity agree before and after fold."""
    model, x = trained(), sequences(1, seed=4)[0]
    with heard():
        before, sparsity = counts(model, x), zeros(model)
    spikenm_fx.fold(model)
    after = counts(model, x)
    assert before == after
    assert sparsity == zeros(model) == pytest.approx(0.5, abs=0.01)
    assert all(0 < effective < dense for effective, dense in after.values())


def test_counting_leaves_the_model_as_it_was() -> None:
    """Copies that are written to share nothing with the model."""
    model, x = trained(), sequences(1, seed=4)[0]
    before = copy.deepcopy(model.state_dict()), model(x), masks(model), step_of(model)
    with heard():
        counts(model, x)
    assert same(before[0], model.state_dict())
    assert torch.equal(before[1], model(x))
    assert same(before[2], masks(model))
    assert before[3] == step_of(model)


# -- other tools ----------------------------------------------------------------------------------


def test_averages_of_weights_and_norms_see_masked_ones() -> None:
    """Reading ``layer.weight`` in any mode gives what the layer multiplies with."""
    model = spikenm_fx.sparsify(network(), rules=ALL_LAYERS, method="srste")
    x = batches(1)[0]
    for mode in (True, False):
        layer = model.train(mode)[0]
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_modules_handed_to_other_processes(mode: bool) -> None:
    """share_memory and a spawned reader see the same outputs."""
    model = spikenm_fx.sparsify(network(), rules=ALL_LAYERS).train(mode)
    x = batches(1)[0]
    expected = model(x).detach()
    model.share_memory()
    assert torch.equal(model(x).detach(), expected)


def test_a_teacher_that_is_a_copy() -> None:
    """A frozen deepcopy as teacher keeps its masks while the student goes on."""
    student = spikenm_fx.sparsify(network(), rules=ALL_LAYERS).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    before = masks(teacher)
    for x in batches(4):
        optimizer.zero_grad()
        (student(x) - teacher(x)).square().mean().backward()
        optimizer.step()
    assert same(before, masks(teacher))
    assert (step_of(student), step_of(teacher)) == (4, 0)


def test_layers_shared_by_two_models() -> None:
    """One trunk under two heads, two optimizers: each step of either is a step of the trunk."""
    trunk = OverTime(nn.Linear(8, 8))
    first = nn.Sequential(trunk, nn.Tanh(), OverTime(nn.Linear(8, 8)))
    spikenm_fx.sparsify(first, rules=ALL_LAYERS).train()
    second = nn.Sequential(trunk, nn.Tanh(), OverTime(nn.Linear(8, 2)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (first, second)]
    seen = [masks(first)["0.layer"]]
    for number, x in enumerate(sequences(4)):
        model, optimizer = ((first, second)[number % 2], optimizers[number % 2])
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        seen.append(masks(first)["0.layer"])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
