# SPDX-License-Identifier: Apache-2.0
"""The compiled mask kernels against the torch path, at every ISA level of this machine."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from strategies import ALL_LAYERS
from torch import Tensor

import spikenm_fx
from spikenm_fx.masks import fused, native
from spikenm_fx.masks.noise import noise_key
from spikenm_fx.masks.sampler import draw_mask, straight_through, top_mask
from spikenm_fx.native.library import native_status
from spikenm_fx.native.toolchain import find_compiler

STATUS = native_status()
needs_kernels = pytest.mark.skipif(not STATUS.available, reason=f"no kernels: {STATUS.reason}")
LEVELS = STATUS.levels or ("none",)
NEAR_TIES = 1e-5  # share of blocks in which the rounding of a logarithm may decide
MANY = 200_000  # blocks in which they are counted


@contextmanager
def torch_path() -> Iterator[None]:
    """Inside, the sampler finds no kernel."""
    with patch.object(native, "kernel_for", lambda *_, **__: None):
        yield


@contextmanager
def kernels_of(level: str) -> Iterator[None]:
    """Inside, the sampler must use the kernels of that ISA level."""
    kernel_for = native.kernel_for

    def of_level(*args: Any) -> Any:
        found = kernel_for(*args, level=level)
        assert found is not None
        return found

    with patch.object(native, "kernel_for", of_level):
        yield


@dataclass(frozen=True)
class Blocks:
    """Logits of one case, and what is drawn from them."""

    logits: Tensor
    keep: int
    kappa: float
    tau: float
    key: tuple[int, int]
    present: Tensor | None

    def random(self) -> Tensor:
        """Numbers of the logits' shape that do not depend on them."""
        return torch.randn(self.logits.shape, generator=torch.Generator().manual_seed(5))


@st.composite
def blocks(draw: st.DrawFn, *, special: bool = True) -> Blocks:
    """Any M the kernels have and any layout; ties, NaN, infinities, padding and empty tensors."""
    m = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 31, 32]))
    inner = draw(st.sampled_from([1, 1, 2, 3, 9, 25, 64, 700, 3000]))
    size = draw(st.sampled_from([0, 1, 15, 17, 300, 1025]))
    lead = 0 if size == 0 else max(1, size // inner)
    if draw(st.integers(0, 9)) == 0:
        inner = 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn((lead, m, inner), generator=generator) * 0.03
    if special and draw(st.booleans()):
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
        which = torch.randint(0, 6, logits.shape, generator=generator)
        often = torch.rand(logits.shape, generator=generator) < 0.5
        logits = torch.where(often, odd[which], logits)
    present = None
    if draw(st.booleans()):
        there = draw(st.integers(1, m))
        present = (torch.arange(lead) % 2 == 0)[:, None] | (torch.arange(m) < there)
        present = present.unsqueeze(-1)
    return Blocks(
        logits,
        keep=draw(st.integers(1, m)),
        kappa=draw(st.sampled_from([1.0, 30.0, 500.0])),
        tau=draw(st.sampled_from([0.05, 0.5, 1.0, 4.0])),
        key=noise_key(draw(st.integers(0, 99)), 1, "layer"),
        present=present,
    )


def _draw(case: Blocks) -> Tensor:
    return draw_mask(case.logits, case.keep, kappa=case.kappa, key=case.key, present=case.present)


def _gradient(case: Blocks, weight: Tensor | None = None) -> Tensor:
    return straight_through(
        *(case.random(), case.logits, case.keep),
        kappa=case.kappa,
        tau=case.tau,
        key=case.key,
        weight=weight,
        present=case.present,
    )


def _blocks_that_differ(
    ours: Tensor, theirs: Tensor, *, rtol: float = 0.0, floor: float = 0.0
) -> int:
    """Blocks with an element off by more than ``rtol``, 0.1 ``rtol`` of the largest and floor."""
    if not ours.numel():
        return 0
    ours, theirs = ours.float(), theirs.float()
    atol = 0.1 * rtol * theirs.abs().max().item() + floor
    return int((~torch.isclose(ours, theirs, rtol=rtol, atol=atol)).any(1).sum())


def _rounding(case: Blocks, weight: Tensor | None = None) -> float:
    """What fp32 leaves of a gradient: a difference of terms as large as kappa / tau * dL/dm.

    It matters where a small tau saturates every softmax of the tensor.
    """
    grad_mask = case.random() if weight is None else case.random() * weight
    return 1e-6 * case.kappa / case.tau * grad_mask.abs().max().item() if grad_mask.numel() else 0


@pytest.mark.skipif(
    find_compiler() is None or os.environ.get("SPIKENM_FX_BUILD") == "0",
    reason="no compiler, or compiling is forbidden",
)
def test_kernels_build_where_a_compiler_is() -> None:
    """Sources that do not compile fail here, instead of leaving every other test skipped."""
    assert STATUS.available, STATUS.reason


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@given(case=blocks())
@tries(60)
def test_deterministic_masks_are_equal(level: str, case: Blocks) -> None:
    """The N largest scores are chosen exactly as torch chooses them, ties and NaN included."""
    with torch_path():
        expected = top_mask(case.logits, case.keep, case.present)
    with kernels_of(level):
        assert torch.equal(top_mask(case.logits, case.keep, case.present), expected)


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@given(case=blocks())
@tries(60)
def test_drawn_masks_agree(level: str, case: Blocks) -> None:
    """The same noise draws the same mask from any blocks, save for near-ties."""
    with torch_path():
        expected = _draw(case)
    with kernels_of(level):
        mask = _draw(case)
    assert mask.shape == expected.shape
    assert _blocks_that_differ(mask, expected) <= 1


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@given(case=blocks(special=False), product=st.booleans())
@tries(60)
def test_gradients_agree(level: str, case: Blocks, product: bool) -> None:
    """The gradient is the torch path's, given dL/dm or the masked weight's gradient."""
    weight = case.random().flip(1) if product else None
    with torch_path():
        expected = _gradient(case, weight)
    with kernels_of(level):
        ours = _gradient(case, weight)
    assert ours.shape == expected.shape
    assert _blocks_that_differ(ours, expected, rtol=1e-4, floor=_rounding(case, weight)) <= 1


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@given(case=blocks())
@tries(40)
def test_gradients_of_odd_logits_stay_finite(level: str, case: Blocks) -> None:
    """NaN and infinite logits get a finite gradient, and their neighbours' does not change."""
    with kernels_of(level):
        assert _gradient(case).isfinite().all()


@functools.cache
def _close_together(keep: int, m: int, inner: int) -> tuple[Blocks, Tensor, Tensor]:
    """Blocks of logits that hardly differ, and what torch makes of them: once for all levels."""
    logits = torch.randn(MANY // inner, m, inner, generator=torch.Generator().manual_seed(1))
    case = Blocks(logits * 0.01, keep, 100.0, 1.0, noise_key(3, 1, "layer"), None)
    with torch_path():
        return case, _draw(case), _gradient(case)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("keep", "m", "inner"), [(2, 4, 1), (1, 4, 9), (4, 8, 1), (1, 16, 1), (8, 16, 25)]
)
def test_near_ties_are_rare(level: str, keep: int, m: int, inner: int) -> None:
    """Of many blocks at most one in 10^5 differs from torch, in the mask or in its gradient."""
    case, mask, gradient = _close_together(keep, m, inner)
    with kernels_of(level):
        flips = _blocks_that_differ(_draw(case), mask)
        steps = _blocks_that_differ(_gradient(case), gradient, rtol=1e-4)
    assert flips <= NEAR_TIES * MANY
    assert steps <= NEAR_TIES * MANY


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
def test_inclusion_probabilities_are_plackett_luce(level: str) -> None:
    """Each position is kept as often as N sequential draws without replacement keep it."""
    pi, keep, count = torch.tensor([0.0, 0.5, -1.0, 1.2]), 2, 400_000
    p = pi.double().softmax(0)
    expected = torch.zeros(4, dtype=torch.double)
    for first, second in itertools.permutations(range(4), keep):
        expected[[first, second]] += p[first] * p[second] / (1 - p[first])
    with kernels_of(level):
        mask = draw_mask(
            (pi / 10).view(1, 4, 1).repeat(count, 1, 1), keep, kappa=10.0, key=noise_key(7, 1, "x")
        )
    assert bool((mask.sum(1) == keep).all())
    sigma = (expected * (1 - expected) / count).sqrt()
    assert bool(((mask.double().mean(0)[:, 0] - expected).abs() < 4 * sigma).all())


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("m", "inner"), [(4, 1), (4, 9), (5, 1), (8, 4000)])
def test_threads_and_neighbours_change_no_bit(level: str, m: int, inner: int) -> None:
    """One thread, four threads and a tensor cut short give the same bits block by block."""
    lead = max(3, 120_000 // inner)
    logits = torch.randn(lead, m, inner, generator=torch.Generator().manual_seed(1))
    case = Blocks(logits, 2, 5.0, 1.0, noise_key(3, 1, "layer"), None)
    threads = torch.get_num_threads()
    results = []
    with kernels_of(level):
        try:
            for count in (1, 4):
                torch.set_num_threads(count)
                results.append((_draw(case), _gradient(case)))
        finally:
            torch.set_num_threads(threads)
        short = Blocks(logits[: lead // 2 + 1], *(2, 5.0, 1.0), noise_key(3, 1, "layer"), None)
        cut = len(short.logits)
        weights = case.random()[:cut]
        gradient = straight_through(
            weights, short.logits, 2, kappa=5.0, tau=1.0, key=noise_key(3, 1, "layer")
        )
        assert torch.equal(_draw(short), results[0][0][:cut])
        assert torch.equal(gradient, results[0][1][:cut])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@needs_kernels
def test_any_memory_layout_is_read() -> None:
    """Transposed, shifted and expanded tensors give what their contiguous copies give."""
    base = torch.randn(9 * 40 * 4 + 1)
    logits = base[1:].view(9, 40, 4).transpose(0, 1).transpose(1, 2)
    key = noise_key(0, 1, "layer")
    grad = torch.ones(1).expand(logits.shape)
    results = [
        straight_through(g, x, 2, kappa=3.0, tau=1.0, key=key, weight=x)
        for g, x in (
            (grad, logits),
            (grad.clone(), logits.clone(memory_format=torch.contiguous_format)),
        )
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(3, 4, 1, dtype=torch.double),
        torch.randn(3, 4, 1).bfloat16(),
        torch.randn(3, 33, 1),
        torch.randn(3, 4, 1, device="meta"),
    ],
    ids=["float64", "bfloat16", "M=33", "meta"],
)
def test_torch_serves_the_rest(scores: Tensor) -> None:
    """Other dtypes, devices and longer blocks are left to torch, which handles them."""
    assert native.kernel_for(scores, 2) is None
    assert top_mask(scores, 2).shape == scores.shape


def test_function_transforms_use_torch() -> None:
    """A tensor wrapped by torch.func has no memory to read: the torch path serves."""
    seen = []

    def chosen(x: Tensor) -> Tensor:
        seen.append(native.kernel_for(x, 2))
        return x.sum()

    torch.func.grad(chosen)(torch.randn(3, 4, 1))
    assert seen == [None]


# -- the passes of a whole step -------------------------------------------------------------------


@contextmanager
def without_passes() -> Iterator[None]:
    """Inside, torch does all the work of a step."""
    with patch.object(fused, "usable", lambda _: False), torch_path():
        yield


@st.composite
def layer_shapes(draw: st.DrawFn) -> tuple[str, list[int], int]:
    """A pattern, input widths of one to three layers (some padded), and a seed."""
    keep, of = draw(st.sampled_from([*((1, m) for m in range(2, 17)), (2, 4), (3, 8)]))
    padded = draw(st.booleans())
    widths = [of * draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 3)))]
    if padded:
        widths = [width + draw(st.integers(0, of - 1)) for width in widths]
    return f"{keep}:{of}", widths, draw(st.integers(0, 999))


def _after_steps(
    case: tuple[str, list[int], int], total_steps: int | None, path: Callable[[], Any]
) -> dict[str, Tensor]:
    """State and training masks after two steps by torch, and a third by ``path``."""
    nm, widths, seed = case
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({str(i): torch.nn.Linear(w, 6) for i, w in enumerate(widths)})
    spikenm_fx.sparsify(
        model, nm, rules=ALL_LAYERS, remainder="pad", seed=seed, total_steps=total_steps
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for taken in (without_passes, without_passes, path):
        for layer in model.values():
            layer.weight_dense.grad = torch.randn(layer.weight_dense.shape, generator=generator)
        with taken():
            optimizer.step()
    state = dict(model.state_dict())
    for name, layer in model.items():
        layer.weight_dense.grad = None
        state[f"{name}.used"] = layer.weight.detach()
    return state


@needs_kernels
@pytest.mark.parametrize("total_steps", [None, 40])
@tries(25)
@given(case=layer_shapes())
def test_steps_of_the_passes_are_those_of_torch(
    total_steps: int | None, case: tuple[str, list[int], int]
) -> None:
    """Logits, momentum, prior, decayed weights and the next masks, of several layers at once.

    Momentum and weights agree to rounding.  A direction is the sign of a sum, a mask the order of
    logits: where rounding decides either, few elements differ; the prior follows their spread.
    Open-ended runs draw so coldly that the gradient of a small layer can be all cancellation, and
    the momentum is in units of it.
    """
    unit = 1e-2 if total_steps is None else 1e-4
    ours, theirs = (_after_steps(case, total_steps, by) for by in (nullcontext, without_passes))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if key.endswith(("_logits", ".used", ".weight")):
            far = ~torch.isclose(value, theirs[key], rtol=1e-4, atol=1e-6)
            assert int(far.sum()) <= max(2, 0.005 * far.numel()), key
        else:
            rtol = 1e-2 if key.endswith("_prior") else 1e-4
            largest = float(theirs[key].abs().max()) if key.endswith("_momentum") else 0.0
            atol = 1e-6 + unit * largest
            torch.testing.assert_close(value, theirs[key], rtol=rtol, atol=atol, msg=key)


@needs_kernels
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    undrawn=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 999),
    last=st.booleans(),
)
def test_masking_and_decay_are_those_of_torch(
    shape: list[int], undrawn: float, seed: int, last: bool
) -> None:
    """Any shape and memory order; what is not drawn is exactly zero, whatever was there."""
    torch.manual_seed(seed)
    tensor, grad, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.5
    if last and len(shape) == 4:
        tensor, grad, mask = (
            t.contiguous(memory_format=torch.channels_last) for t in (tensor, grad, mask)
        )
    expected = grad + 0.3 * tensor * ~mask
    assert native.add_decay(grad, tensor, mask, 0.3)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)
    if not undrawn:
        tensor[~mask] = torch.inf
    found = native.kept(tensor, mask, undrawn)
    assert found is not None
    rest = tensor * undrawn if undrawn else torch.zeros_like(tensor)
    assert torch.equal(found, torch.where(mask, tensor, rest))
    assert found.stride() == tensor.stride()
