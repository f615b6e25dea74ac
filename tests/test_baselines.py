# SPDX-License-Identifier: Apache-2.0
"""The baselines compute what their papers say."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from strategies import ALL_LAYERS, batches, network

import spikenm_fx
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.methods.magnitude import Magnitude
from spikenm_fx.masks.methods.maskllm import MaskLLM
from spikenm_fx.masks.methods.random import RandomMask
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.masks.methods.srste import SRSTE
from spikenm_fx.masks.noise import gumbel, noise_key
from spikenm_fx.pattern import NM


def draw(nm: NM, step: int = 1, *, kappa: float = 3.0, tau: float = 0.7):
    return Draw(nm, kappa=kappa, tau=tau, key=noise_key(0, step, "layer"))


@pytest.mark.parametrize("method", [SRSTE(decay=0.3), SpikeNM(decay=0.3, eid=None)])
def test_the_gradient_of_sr_ste(method) -> None:
    """grad_w = dense gradient + decay * (1 - m) * w (arXiv 2102.04010, eq. 6)."""
    model = spikenm_fx.sparsify(network(), "2:4", method=method, rules=ALL_LAYERS)
    plain = network()
    masked = {}
    for index in (0, 2, 4):
        masked[index] = model[index].weight.detach().clone()
        plain[index].weight.data.copy_(masked[index])
    x = batches(1)[0]
    model(x).square().mean().backward()
    plain(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()  # what it sees has the decay in it
    for index, weight in masked.items():
        dense = model[index].weight_dense.detach()
        expected = plain[index].weight.grad + 0.3 * dense * (weight == 0)
        torch.testing.assert_close(model[index].weight_dense.grad, expected)


def test_sr_ste_follows_the_weights() -> None:
    """Its mask is that of the largest weights now, magnitude's that of the start, for good."""
    models = {
        name: spikenm_fx.sparsify(network(), "1:4", method=name) for name in ("srste", "magnitude")
    }
    for name, model in models.items():
        start = model[2].weight.detach() != 0
        with torch.no_grad():
            model[2].weight_dense.copy_(model[2].weight_dense.flip(1))
        in_evaluation = model.eval()[2].weight.detach() != 0
        model.train()(batches(1)[0]).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        now = model[2].weight.detach() != 0  # masks of training move with the steps
        assert torch.equal(now, in_evaluation)
        blocks = model[2].weight_dense.detach().abs().view(-1, 4)
        largest = torch.zeros_like(blocks, dtype=torch.bool)
        largest.scatter_(1, blocks.argmax(1, keepdim=True), True)
        assert torch.equal(now, largest.view_as(now)) == (name == "srste")
        assert torch.equal(now, start) == (name == "magnitude")


@pytest.mark.parametrize("nm", [NM(2, 4), NM(1, 3), NM(3, 5), NM(2, 2)])
def test_maskllm_against_enumeration(nm: NM) -> None:
    """Mask and gradient equal a loop over all candidate masks with the same noise."""
    method, settings = MaskLLM(), draw(nm)
    subsets = list(combinations(range(nm.of), nm.keep))
    scores = torch.randn(6, len(subsets), 2)
    weight = torch.randn(6, nm.of, 2)
    mask = method.train_mask(weight, scores, settings)
    final = method.final_mask(weight, scores, settings)
    upstream = torch.randn(6, nm.of, 2)
    grad = method.score_grad(upstream / weight, weight, scores, settings)
    noise = gumbel(scores, settings.key)
    for block in range(6):
        for inner in range(2):
            pi = scores[block, :, inner].clone().requires_grad_()
            perturbed = 3.0 * pi + noise[block, :, inner]
            chosen = subsets[int(perturbed.argmax())]
            assert mask[block, :, inner].nonzero().flatten().tolist() == list(chosen)
            best = subsets[int(pi.argmax())]
            assert final[block, :, inner].nonzero().flatten().tolist() == list(best)
            candidates = torch.zeros(len(subsets), nm.of)
            for row, subset in enumerate(subsets):
                candidates[row, list(subset)] = 1.0
            soft = torch.softmax(perturbed / 0.7, 0) @ candidates
            (expected,) = torch.autograd.grad(soft, pi, upstream[block, :, inner])
            torch.testing.assert_close(grad[block, :, inner], expected, rtol=1e-4, atol=1e-5)


def test_maskllm_draws_its_softmax() -> None:
    """Candidates come up as often as softmax(kappa * logits) says."""
    nm, scores = NM(1, 3), torch.tensor([0.5, 0.0, -0.4]).view(1, 3, 1).expand(4000, 3, 1)
    counts = torch.zeros(3)
    for step in range(5):
        counts += MaskLLM().train_mask(scores, scores, draw(nm, step)).float().sum((0, 2))
    expected = torch.softmax(3.0 * scores[0, :, 0], 0)
    torch.testing.assert_close(counts / counts.sum(), expected, atol=0.01, rtol=0)


def test_maskllm_prior() -> None:
    """The candidate of the largest weights starts highest, by overlap (eq. 9 and 10)."""
    nm = NM(2, 4)
    weight = torch.randn(50, 4, 1)
    scores = MaskLLM(std=0.01, prior=3.0).init_scores(weight, draw(nm))
    subsets = list(combinations(range(4), 2))
    for block in range(50):
        top = set(weight[block, :, 0].abs().topk(2).indices.tolist())
        overlap = [len(top & set(subset)) - 1 for subset in subsets]
        noise = scores[block, :, 0] - 0.03 * torch.tensor(overlap)
        assert noise.abs().max() < 0.06
    assert math.comb(4, 2) == scores.shape[1]


def test_random_masks_are_uniform_and_fixed() -> None:
    """Every position is kept equally often, and the same ones at every step."""
    nm, weight = NM(1, 4), torch.zeros(20_000, 4, 1)
    masks = [RandomMask().final_mask(weight, None, draw(nm, 0)) for _ in range(2)]
    assert torch.equal(*masks)
    share = masks[0].float().mean((0, 2))
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.015, rtol=0)
    model = spikenm_fx.sparsify(network(), "1:4", method=RandomMask())
    seen = []
    for x in batches(3):
        seen.append(model[2].weight.detach() != 0)
        model(x).square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert all(torch.equal(seen[0], mask) for mask in seen)


def test_magnitude_only_trains_what_it_keeps() -> None:
    """Pruned weights get no gradient in one-shot pruning (ASP)."""
    model = spikenm_fx.sparsify(network(), "2:4", method=Magnitude())
    model(batches(1)[0]).square().mean().backward()
    kept = model[2].weight.detach() != 0
    assert not model[2].weight_dense.grad[~kept].any()
    assert model[2].weight_dense.grad[kept].any()
