# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that run piece by piece: what is there is kept, unless it was measured otherwise."""

import json
from argparse import ArgumentParser

import pytest
import torch

from spikenm_fx.bench import dispatch, gpu
from spikenm_fx.bench.measure import add_resuming, measured
from spikenm_fx.bench.versions import Version, versions


def _options(tmp_path, *arguments):
    parser = ArgumentParser()
    add_resuming(parser)
    return parser.parse_args(["--out", str(tmp_path), *arguments])


def _bench(options, keys, about=None):
    """Keys that were measured, and those that the result holds in the end."""
    seen = []
    wanted = {key: lambda key=key: seen.append(key) or {"value": key * 2} for key in keys}
    rows = measured("x", wanted, about or {"repeats": 1}, lambda rows: {"n": len(rows)}, options)
    assert all(row["value"] == row["key"] * 2 for row in rows)
    return seen, [row["key"] for row in rows]


def test_goes_on_where_it_stopped(tmp_path):
    """Rows of an earlier run are kept and not measured again, unless that is asked for."""
    assert _bench(_options(tmp_path, "--seconds", "-1"), "ab", None) == ([], [])
    assert _bench(_options(tmp_path), "ab") == (["a", "b"], ["a", "b"])
    assert _bench(_options(tmp_path), "abc") == (["c"], ["a", "b", "c"])
    assert _bench(_options(tmp_path, "--again"), "b") == (["b"], ["a", "b", "c"])
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["summary"] == {"n": 3}


def test_other_settings_or_machines_start_afresh(tmp_path):
    """Rows measured under other settings, or elsewhere, are not mixed with new ones."""
    _bench(_options(tmp_path), "ab")
    assert _bench(_options(tmp_path), "b", {"repeats": 2}) == (["b"], ["b"])
    saved = json.loads((tmp_path / "x.json").read_text())
    saved["machine"]["cpu"] = "another"
    (tmp_path / "x.json").write_text(json.dumps(saved))
    assert _bench(_options(tmp_path), "a", {"repeats": 2}) == (["a"], ["a"])


def test_dispatch_measures_what_pack_chooses(tmp_path):
    """The bench reports a choice of pack() and its ratio to torch's own layer, by rate."""
    arguments = ["--only", "8 x 64->10", "--repeats", "1", "--out", str(tmp_path)]
    dispatch.main([*arguments, "--rates", "0", "1"])
    saved = json.loads((tmp_path / "dispatch-1t.json").read_text())
    assert [row["rate"] for row in saved["rows"]] == [0.0, 1.0]
    for row in saved["rows"]:
        assert row["choice"] in {*row["ms_at_pack"], "torch"}  # the model's own, where none gains
        assert row["over_dense"] == row["ms"]["dense"] / row["ms"]["packed"] > 0
    assert sum(group["of"] for group in saved["summary"].values()) == 2


@pytest.mark.slow
def test_two_versions_answer_the_same_questions(tmp_path):
    """A worker runs whatever package its folder holds; a folder without one is refused."""
    with pytest.raises(OSError, match="holds no package"):
        versions(tmp_path)
    found = versions(versions(None)["after"])
    assert list(found) == ["before", "after"]
    asked = {"network": "fc8", "method": "srste", "nm": "2:4", "batch": 2}
    with Version(found["before"], threads=1) as version:
        assert version.ask("time", **asked)["seconds"] > 0
        memory = version.ask("memory", **asked)
        assert memory["alive"][-1] > memory["weights"] > 0
        with pytest.raises(OSError, match="ended"):
            version.ask("nothing of the kind")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_claimed(tmp_path, capsys):
    """The GPU bench says and records that it has not measured."""
    gpu.main(["--out", str(tmp_path)])
    assert gpu.NOT_MEASURED in capsys.readouterr().out
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["status"] == gpu.NOT_MEASURED
    assert "steps" not in saved
