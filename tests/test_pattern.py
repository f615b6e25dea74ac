# SPDX-License-Identifier: Apache-2.0
"""Patterns parse as written, and blocks are what the definition says, index by index."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases, patterns
from torch import nn

from spikenm_fx import NM
from spikenm_fx.errors import PatternError, SpikeNMError
from spikenm_fx.pattern import BlockView, is_weight_layer


@given(patterns(32))
def test_parse_reads_what_str_writes(nm):
    """Str and parse are inverse, and pairs and patterns themselves parse too."""
    assert NM.parse(str(nm)) == NM.parse(f" {nm.keep} : {nm.of} ") == nm
    assert NM.parse((nm.keep, nm.of)) == NM.parse(nm) == nm
    assert nm.density == nm.keep / nm.of
    assert nm.describe() == f"{nm.keep}:{nm.of} (keep at most {nm.keep} of {nm.of})"


@pytest.mark.parametrize(
    "bad",
    [
        *[
            "5:4",
            "0:4",
            "2:4:8",
            "",
            "2",
            ":4",
            "2:",
            "2/4",
            "-2:4",
            "2.0:4",
            "٢:٤",
            "２:４",
            "0x2:4",
        ],
        *["a:b", "2:4x", "1e0:4", "22222:33333", 124, 0, -1, True, None, 0.5, 2.4, b"2:4"],
        *[[2, 4], {2: 4}, (2,), (2, 4, 8), (2.0, 4), ("2", "4"), (True, 4), (5, 4), (0, 4), (0, 0)],
        *[(-1, -1), (float("nan"), 4), (torch.tensor(2), 4)],
    ],
    ids=repr,
)
def test_bad_patterns_are_refused(bad):
    """Anything that is not n:m with 1 <= n <= m raises a PatternError that shows what was seen."""
    with pytest.raises(PatternError) as caught:
        NM.parse(bad)
    assert isinstance(caught.value, SpikeNMError)
    assert isinstance(caught.value, ValueError)
    shown = ":".join(map(repr, bad)) if isinstance(bad, tuple) and len(bad) == 2 else repr(bad)
    assert shown.strip("'") in str(caught.value)


@given(st.integers(1, 59), st.integers(1, 59))
def test_unquoted_yaml_is_explained(keep, of):
    """The number that YAML 1.1 makes of an unquoted pattern is named with the pattern it was."""
    number = 60 * keep + of
    with pytest.raises(PatternError, match=f"'{keep}:{of}'"):
        NM.parse(number)


def test_a_pattern_is_a_value():
    """Patterns compare and hash by value and cannot be changed."""
    assert {NM(2, 4), NM.parse("2:4")} == {NM(2, 4)}
    with pytest.raises(AttributeError):
        NM(2, 4).keep = 3


def _oracle(case: Case, weight: torch.Tensor, fill: float) -> torch.Tensor:
    """Blocks by the definition, one index at a time."""
    m, per_group = case.nm.of, case.channels
    blocks = math.ceil(per_group / m)
    if case.transposed:
        inner = weight[0].numel()
        flat = weight.reshape(case.groups * per_group, inner)
        out = torch.full((case.groups * blocks, m, inner), fill, dtype=weight.dtype)
        for channel in range(flat.shape[0]):
            group, c = divmod(channel, per_group)
            for i in range(inner):
                out[group * blocks + c // m, c % m, i] = flat[channel, i]
        return out
    flat = weight.reshape(weight.shape[0], per_group, -1)
    out = torch.full((len(flat) * blocks, m, flat.shape[2]), fill, dtype=weight.dtype)
    for o in range(flat.shape[0]):
        for c in range(per_group):
            for i in range(flat.shape[2]):
                out[o * blocks + c // m, c % m, i] = flat[o, c, i]
    return out


@given(cases(depthwise=True), st.sampled_from([0.0, -7.0]))
def test_blocks_match_the_definition(case, fill):
    """to_blocks equals a slow index-by-index construction; from_blocks undoes it exactly."""
    layer = case.layer()
    weight = torch.arange(layer.weight.numel()).reshape(layer.weight.shape).to(torch.float32)
    view = BlockView.of_layer(layer, case.nm)
    blocks = view.to_blocks(weight, fill=fill)
    assert torch.equal(blocks, _oracle(case, weight, fill))
    assert tuple(blocks.shape) == view.blocked_shape
    assert torch.equal(view.from_blocks(blocks), weight)
    assert view.channels == case.channels
    assert view.remainder == case.channels % case.nm.of
    assert (view.remainder == 0) == (view.padding == 0) == (view.present() is None)


@given(cases(depthwise=True))
def test_present_marks_exactly_what_exists(case):
    """present() is False exactly at the positions that padding made."""
    layer = case.layer()
    view = BlockView.of_layer(layer, case.nm)
    exists = view.to_blocks(torch.ones(layer.weight.shape)) == 1
    present = view.present()
    expected = torch.ones(view.blocked_shape, dtype=torch.bool) if present is None else present
    assert torch.equal(expected.expand(view.blocked_shape), exists)


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 3), nn.Conv2d(8, 4, 3), nn.ConvTranspose1d(8, 4, 2)]
)
def test_whole_blocks_are_a_view(layer):
    """Where M divides the channels no copy is made."""
    view = BlockView.of_layer(layer, NM(2, 4))
    assert view.to_blocks(layer.weight).data_ptr() == layer.weight.data_ptr()


@given(cases())
def test_wrong_shapes_are_refused(case):
    """A tensor of another shape raises a PatternError that names both shapes."""
    view = BlockView.of_layer(case.layer(), case.nm)
    wrong = torch.zeros(*view.shape, 2)
    with pytest.raises(PatternError, match="shape"):
        view.to_blocks(wrong)
    with pytest.raises(PatternError, match="shape"):
        view.from_blocks(torch.zeros(*view.blocked_shape, 1))


def test_only_weight_layers_have_blocks():
    """Blocks of a norm or an embedding are refused by name; subclasses of layers are not."""

    class Framework(nn.Conv2d):
        pass

    assert is_weight_layer(Framework(4, 4, 1))
    assert not is_weight_layer(nn.Embedding(4, 4))
    with pytest.raises(PatternError, match="norm is a BatchNorm1d"):
        BlockView.of_layer(nn.BatchNorm1d(4), NM(2, 4), name="norm")


def test_gradients_flow_through_the_view():
    """Blocking and unblocking are differentiable, padding included."""
    weight = torch.randn(3, 6, 2, 2, requires_grad=True)
    view = BlockView(NM(2, 4), (3, 6, 2, 2))
    (view.from_blocks(view.to_blocks(weight)) * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))


@given(cases())
def test_rows_hold_the_blocks_of_each_output(case) -> None:
    """There and back again, and each row has the weights of one output channel."""
    layer = case.layer()
    view = BlockView.of_layer(layer, case.nm)
    blocks = view.to_blocks(layer.weight.detach().double())
    rows = view.rows(blocks)
    assert torch.equal(view.from_rows(rows), blocks)
    by_output = view.output_major(layer.weight.detach().double())
    assert by_output.shape[:2] == (case.outputs * case.groups, case.channels)
    assert rows.shape[0] == by_output.shape[0]
    ours, theirs = (each.flatten(1).sort(1, descending=True).values for each in (rows, by_output))
    assert torch.equal(ours[ours != 0], theirs[theirs != 0])
