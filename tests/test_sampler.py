# SPDX-License-Identifier: Apache-2.0
"""The sampler draws what Plackett-Luce says, and its gradient is the one it states."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import patterns, scores

from spikenm_fx import NM
from spikenm_fx.masks.noise import gumbel, noise_key
from spikenm_fx.masks.sampler import draw_mask, straight_through, top_mask


def subset_probabilities(logits: torch.Tensor, keep: int) -> dict[frozenset[int], torch.Tensor]:
    """Plackett-Luce probability of each kept set, summed over all orders; differentiable."""
    p = torch.softmax(logits, 0)
    total: dict[frozenset[int], torch.Tensor] = {}
    for order in itertools.permutations(range(len(p)), keep):
        probability, left = torch.ones((), dtype=p.dtype), torch.ones((), dtype=p.dtype)
        for i in order:
            probability, left = probability * p[i] / left, left - p[i]
        key = frozenset(order)
        total[key] = total.get(key, torch.zeros((), dtype=p.dtype)) + probability
    return total


LAWS = [
    (2, 4, [0.0, 0.0, 0.0, 0.0]),
    (2, 4, [1.0, -0.5, 0.3, 2.0]),
    (1, 4, [0.2, -1.0, 1.5, 0.0]),
    (3, 4, [0.0, 1.0, 2.0, -2.0]),
    (2, 8, [0.5, -0.5, 1.0, 0.0, 2.0, -1.0, 0.25, 0.0]),
    (4, 6, [0.0, 0.7, -0.7, 1.4, 0.1, -2.0]),
]


@pytest.mark.parametrize(("keep", "of", "logits"), LAWS)
def test_probabilities_are_plackett_luce(keep, of, logits):
    """Single and pair inclusion probabilities equal exact enumeration within four sigma."""
    exact = subset_probabilities(torch.tensor(logits, dtype=torch.float64), keep)
    count, kappa = 120_000, 2.0
    blocks = (torch.tensor(logits) / kappa).reshape(1, of, 1).expand(count // 4, of, 4)
    mask = draw_mask(blocks, keep, kappa=kappa, key=noise_key(0, 0, f"{keep}:{of}"))
    kept = mask.movedim(1, 2).reshape(-1, of).double()
    assert (kept.sum(1) == keep).all()
    pairs = kept.T @ kept / count
    for i, j in itertools.combinations_with_replacement(range(of), 2):
        p = float(sum(q for chosen, q in exact.items() if i in chosen and j in chosen))
        sigma = (max(p * (1 - p), 1e-9) / count) ** 0.5
        assert abs(float(pairs[i, j]) - p) < 4 * sigma + 1e-9, (i, j)


def gumbel_of(key, count):
    """The noise of a key, as the sampler draws it."""
    return gumbel(torch.empty(count), key)


def relaxed_oracle(grad_mask, logits, keep, *, kappa, tau, key, present=None):
    """The straight-through gradient by float64 autograd, draw by draw, block by block."""
    lead, m, inner = logits.shape
    noise = gumbel_of(key, logits.numel()).reshape(logits.shape).double()
    pi = logits.detach().double().requires_grad_()
    z = kappa * pi + noise
    if present is not None:
        z = torch.where(present, z, -torch.inf)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(lead):
        for i in range(inner):
            column, left = z[b, :, i], torch.ones(m, dtype=torch.bool)
            union = torch.ones(m, dtype=torch.float64)
            for _ in range(min(keep, int(torch.isfinite(column).sum()))):
                soft = torch.softmax(torch.where(left, column, -torch.inf) / tau, 0)
                best = int(torch.where(left, column, -torch.inf).argmax())
                hard = torch.zeros(m, dtype=torch.float64)
                hard[best] = 1
                union = union * (1 - (hard + soft - soft.detach()))
                left = left.clone()
                left[best] = False
            total = total + ((1 - union) * grad_mask[b, :, i].double()).sum()
    return torch.autograd.grad(total, pi)[0]


@given(
    patterns(12),
    st.sampled_from([0.1, 1.0, 30.0, 1000.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(0, 2**16),
)
@example(NM(4, 8), 300.0, 1.0, 0)
@example(NM(8, 16), 1000.0, 0.5, 0)
def test_straight_through_is_the_relaxed_draws(nm, kappa, tau, seed):
    """dL/dpi equals autograd through sequential relaxed draws, near and far apart logits alike."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, nm.of, 2, generator=generator)
    grad = torch.randn(3, nm.of, 2, generator=generator)
    key = noise_key(seed, 0, "x")
    got = straight_through(grad, logits, nm.keep, kappa=kappa, tau=tau, key=key)
    want = relaxed_oracle(grad, logits, nm.keep, kappa=kappa, tau=tau, key=key)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double() / kappa, want / kappa, atol=2e-4, rtol=1e-3)


def test_straight_through_with_padding():
    """Padded positions get no gradient, and the others that of the shorter block."""
    present = torch.tensor([[True] * 4, [True, True, True, False]]).unsqueeze(-1)
    logits, grad = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    grad[1, 3] = 0
    key, arguments = noise_key(0, 0, "x"), {"kappa": 2.0, "tau": 1.0}
    for keep in (1, 2, 3):
        got = straight_through(grad, logits, keep, key=key, present=present, **arguments)
        want = relaxed_oracle(grad, logits, keep, key=key, present=present, **arguments)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
        assert (got[1, 3] == 0).all()


def test_straight_through_survives_scaled_gradients():
    """Gradients as a loss scaler makes them do not overflow, wherever the logits are."""
    grad = torch.full((1, 8, 4), 65536.0 * 1000)
    logits = torch.randn(1, 8, 4) * 10
    got = straight_through(grad, logits, 4, kappa=500.0, tau=1.0, key=noise_key(0, 0, "x"))
    assert torch.isfinite(got).all()


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (2, 8)])
def test_mean_gradient_points_along_the_exact_one(keep, of):
    """Over many random blocks the mean straight-through gradient has cosine >= 0.95 to the exact.

    The loss is linear in the mask, so the exact gradient is that of sum_S P(S) sum_{i in S} c_i.
    """
    generator = torch.Generator().manual_seed(of)
    blocks, draws = 24, 4000
    logits = torch.randn(blocks, of, generator=generator)
    slopes = torch.randn(blocks, of, generator=generator)
    exact = []
    for pi, c in zip(logits.double(), slopes.double(), strict=True):
        pi.requires_grad_()
        loss = sum(p * c[list(s)].sum() for s, p in subset_probabilities(pi, keep).items())
        exact.append(torch.autograd.grad(loss, pi)[0])
    want = torch.stack(exact)
    shape = (blocks, of, draws)
    got = straight_through(
        slopes[..., None].expand(shape),
        logits[..., None].expand(shape),
        keep,
        kappa=1.0,
        tau=1.0,
        key=noise_key(0, 0, "exact"),
    ).double()
    cosine = torch.cosine_similarity(got.mean(2).flatten(), want.flatten(), dim=0)
    assert float(cosine) >= 0.95


@given(patterns(16) | st.sampled_from([NM(4, 32), NM(31, 32), NM(5, 17)]), st.data())
def test_never_more_than_keep(nm, data):
    """Whatever the scores hold, exactly N of M positions are chosen, at random or by rank."""
    blocks = data.draw(scores(nm))
    chosen = top_mask(blocks, nm.keep)
    drawn = draw_mask(blocks, nm.keep, kappa=3.0, key=noise_key(0, 0, "x"))
    for mask in (chosen, drawn):
        assert mask.dtype == torch.bool
        assert mask.shape == blocks.shape
        assert (mask.sum(1) == nm.keep).all()


@given(patterns(16) | st.sampled_from([NM(4, 32), NM(31, 32), NM(5, 17)]), st.data())
def test_top_mask_is_a_stable_sort(nm, data):
    """The chosen are the first N of a stable descending sort with NaN at the bottom."""
    blocks = data.draw(scores(nm))
    mask = top_mask(blocks, nm.keep)
    finite = blocks.float().nan_to_num(nan=torch.finfo(torch.float32).min)
    for b in range(blocks.shape[0]):
        for i in range(blocks.shape[2]):
            column = finite[b, :, i].tolist()
            order = sorted(range(nm.of), key=lambda j: -column[j])  # sorted is stable
            assert mask[b, :, i].nonzero().flatten().tolist() == sorted(order[: nm.keep])


@given(patterns(16), st.data())
def test_padding_is_never_chosen(nm, data):
    """Padded positions stay out, even against NaN; of the others min(N, present) are chosen."""
    blocks = data.draw(scores(nm))
    exist = data.draw(st.integers(1, nm.of))
    present = (torch.arange(nm.of) < exist).expand(blocks.shape[0], nm.of).unsqueeze(-1)
    for mask in (
        top_mask(blocks, nm.keep, present),
        draw_mask(blocks, nm.keep, kappa=1.0, key=noise_key(0, 0, "x"), present=present),
    ):
        assert not mask[:, exist:].any()
        assert (mask.sum(1) == min(nm.keep, exist)).all()


@given(st.integers(1, 20), st.integers(0, 2**16))
def test_ranks_are_permutations(m, seed):
    """The ranks by which positions are kept are a permutation in each column, ties or not."""
    planes = torch.randint(0, 3, (1, m, 7), generator=torch.Generator().manual_seed(seed)).float()
    ranks = sum((~top_mask(planes, keep)).long() for keep in range(1, m + 1))
    assert torch.equal(ranks[0].sort(0).values, torch.arange(m)[:, None].expand(m, 7))
