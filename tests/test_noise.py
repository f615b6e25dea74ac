# SPDX-License-Identifier: Apache-2.0
"""The noise is a function of (seed, step, name, index) and of nothing else."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikenm_fx.masks import sampler
from spikenm_fx.masks.noise import gumbel, noise_key


def drawn(count: int, *, seed: int = 0, step: int = 0, name: str = "layer", start: int = 0):
    """``count`` numbers from counter ``start`` on."""
    return gumbel(torch.empty(count), noise_key(seed, step, name), start)


SCRIPT = """
import torch
from spikenm_fx.masks.noise import noise_key
from spikenm_fx.masks.sampler import draw_mask
logits = torch.linspace(-1, 1, 8 * 4096).reshape(4096, 4, 2)
weights = torch.arange(1, logits.numel() + 1, dtype=torch.int64)
for threads in (1, 2):
    torch.set_num_threads(threads)
    mask = draw_mask(logits, 2, kappa=1.0, key=noise_key(3, 5, "a.b"))
    print(int((mask.flatten().long() * weights).sum()), noise_key(3, 5, "a.b"))
"""


@pytest.fixture(scope="module")
def here():
    """What this process draws, printed as the other processes print it."""
    logits = torch.linspace(-1, 1, 8 * 4096).reshape(4096, 4, 2)
    mask = sampler.draw_mask(logits, 2, kappa=1.0, key=noise_key(3, 5, "a.b"))
    weights = torch.arange(1, mask.numel() + 1, dtype=torch.int64)
    return f"{int((mask.flatten().long() * weights).sum())} {noise_key(3, 5, 'a.b')}"


@pytest.mark.slow
def test_same_in_another_process(here):
    """Another process, with its own hash seed and any thread count, draws the same masks."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == [here, here]


@pytest.mark.slow
@given(
    st.integers(0, 2**40), st.integers(0, 2**40), st.text(max_size=20), st.integers(0, 2**31 - 65)
)
def test_windows_see_the_same_stream(seed, step, name, start):
    """Counter i has the same noise whatever the window it is drawn in."""
    whole = drawn(64, seed=seed, step=step, name=name, start=start)
    assert torch.equal(whole[17:40], drawn(23, seed=seed, step=step, name=name, start=start + 17))
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"name": "other"}, {"start": 1000}])
def test_each_part_of_the_key_matters(change):
    """Changing seed, step, name or counters gives noise that is unrelated."""
    a, b = drawn(20_000), drawn(20_000, **change)
    correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    if "start" in change:
        correlation = float(torch.corrcoef(torch.stack([a[:1000], b[:1000]]))[0, 1]) / 4
    assert abs(correlation) < 4 / math.sqrt(20_000)


def test_tile_size_does_not_matter():
    """Masks and gradients are the same whatever parts the weight is walked in."""
    logits, grad = torch.randn(37, 8, 3), torch.randn(37, 8, 3)
    key = noise_key(0, 1, "x")
    results = []
    for tile in (1, 5, 37):
        parts = []
        for start in range(0, 37, tile):
            part = logits[start : start + tile]
            noise = gumbel(part, key, start * 8 * 3)
            arguments = {"kappa": 2.0, "noise": noise}
            gradient = sampler.straight_through(
                grad[start : start + tile], part, 3, tau=1.0, **arguments
            )
            mask = sampler.draw_mask(part, 3, **arguments)
            parts.append((mask, gradient, sampler.top_mask(part, 3)))
        results.append([torch.cat(found) for found in zip(*parts, strict=True)])
    for mask, gradient, top in results[1:]:
        assert torch.equal(mask, results[0][0])
        assert torch.allclose(gradient, results[0][1], atol=1e-6)
        assert torch.equal(top, results[0][2])


def test_torch_generators_are_left_alone():
    """Sampling does not consume torch's own random numbers."""
    before = torch.random.get_rng_state()
    sampler.draw_mask(torch.zeros(8, 4, 2), 2, kappa=1.0, key=noise_key(0, 0, "x"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("key", [(0, 0, "a"), (1, 7, "b"), (2**40, 10**9, "c.d.e")])
def test_distributed_as_gumbel(key):
    """Kolmogorov-Smirnov: the noise follows exp(-exp(-x)), and neighbours are independent."""
    count = 200_000
    noise = drawn(count, seed=key[0], step=key[1], name=key[2]).double()
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    grid = torch.arange(1, count + 1, dtype=torch.float64) / count
    above, below = grid - uniform, uniform - grid + 1 / count
    distance = float(torch.maximum(above, below).max())
    assert distance * math.sqrt(count) < 1.95  # exceeded by chance once in a thousand
    for lag in (1, 2, 3, 4, 8, 16):
        pair = torch.stack([noise[:-lag], noise[lag:]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4.5 / math.sqrt(count)
