# SPDX-License-Identifier: Apache-2.0
"""The demo runs, briefly, and shows what it promises."""

import pytest

import spikenm_fx

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows():
    """One epoch of each network, and the patterns that the progress was told of.

    On every sixteenth image: two steps of each.
    """
    pytest.importorskip("sklearn")
    from spikenm_fx.demo import run
    from spikenm_fx.demo.data import Split

    told: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        few = Split(*(part[::16] for part in run.digits()))
        patched.setattr(run, "digits", lambda: few)
        return list(run.run_demo(epochs=1, on_step=told.append)), told, run.steps_of(1)


def test_three_networks_are_compared(rows):
    """Dense, 2:4 and 1:8, in this order, each sparse one verified and smaller."""
    table, told, steps = rows
    assert [row.pattern for row in table] == ["dense", "2:4", "1:8"]
    assert len(told) == 3 * steps
    for row in table:
        assert 0 <= row.accuracy <= 1  # one epoch is too short to learn
        assert row.synops > 0
        assert row.packed_bytes > 0
    assert table[0].verification is None
    for row in table[1:]:
        row.verification.raise_if_invalid()
        assert spikenm_fx.verify(row.network, row.pattern).valid
        assert type(row.network.hidden).__name__ == "Linear"
    assert table[0].synops > table[1].synops > table[2].synops
    assert table[0].density > table[1].density > table[2].density
    assert table[0].packed_bytes > table[1].packed_bytes > table[2].packed_bytes


def test_the_picture_is_written(rows, tmp_path):
    """draw_masks writes a PNG."""
    pytest.importorskip("matplotlib")
    from spikenm_fx.demo.run import draw_masks

    draw_masks(rows[0], tmp_path / "masks.png")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
