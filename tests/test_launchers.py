# SPDX-License-Identifier: Apache-2.0
"""Two real processes under ``torchrun``, and the trainers of others: the model of one process.

What the processes do is in ``launched.py``.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import launched
import pytest
import torch.distributed.run
from forks import forked

pytestmark = pytest.mark.slow

TRAINED = ["torchrun", "accelerate", "Lightning, DDP", "Lightning, FSDP2"]
JELLY = ["SpikingJelly, DDP", "SpikingJelly, FSDP2"]


def _torchrun(folder: str) -> None:
    """``torchrun`` itself, its ranks forks of the agent: what they need is imported once."""
    for name in launched.IMPORTED:
        importlib.import_module(name)
    forks = ("--run-path", "--start-method=fork")
    launch = ("--standalone", f"--nproc-per-node={launched.RANKS}", *forks)
    torch.distributed.run.main([*launch, launched.__file__, folder])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found, all in one launch."""
    pytest.importorskip("spikingjelly")
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("launched")
    ended = forked(_torchrun, str(folder), OMP_NUM_THREADS="1")
    assert ended.status == 0, ended.err[-4000:]
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(launched.RANKS)]


def _of(found: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    for rank in found:
        assert "failed" not in rank[check], rank[check]["failed"]
    return [rank[check] for rank in found]


@pytest.mark.parametrize("check", [*TRAINED, *JELLY])
def test_launched_ranks_are_one_process(found: list[dict[str, Any]], check: str) -> None:
    """The masks of one process on the joint batch, its state to rounding, each step counted."""
    for rank in _of(found, check):
        assert rank["masks"], "other masks than one process"
        assert rank["far"] < 1e-12
        assert rank["keys"]
        assert rank["moved"], "masks have not learnt"
        assert rank["steps"] == [launched.STEPS] * 2


@pytest.mark.parametrize("way", launched.COMPILED)
def test_compiled_ranks_are_those_uncompiled(found: list[dict[str, Any]], way: str) -> None:
    """``torch.compile`` before and after DDP and ``fully_shard``, EID on: bit by bit the same run.

    Graphs are those of training, of steps in which credits are due, and of evaluation, each once
    for the whole model, or for its parts where these are compiled or FSDP breaks the graph.
    """
    for rank in _of(found, "compilers"):
        seen = rank[way]
        assert seen["equal"], "weights, logits, momenta or credits differ"
        assert seen["outputs"], "evaluation differs"
        assert seen["credits"] == 2
        assert seen["steps"] == launched.STEPS
        assert 1 <= seen["graphs"] <= 3 * (1 if "DDP" in way else launched.PARTS)


@pytest.mark.parametrize("check", JELLY)
@pytest.mark.parametrize("who", ["all", "first"])
def test_full_checkpoints_go_back_and_forth(
    found: list[dict[str, Any]], check: str, who: str
) -> None:
    """``StateDictOptions(full_state_dict=True)``, as SpikingJelly saves, also from rank 0 alone."""
    assert all(rank["back"][who] for rank in _of(found, check))


def test_accelerate_hands_the_model_back(found: list[dict[str, Any]]) -> None:
    """``unwrap_model`` gives the sparse model itself, which can be folded."""
    assert all(rank["unwrapped"] for rank in _of(found, "accelerate"))


def test_the_strategy_for_fsdp1_is_refused(found: list[dict[str, Any]]) -> None:
    """One error that names the layer and the successor."""
    for rank in _of(found, "Lightning, FSDP1"):
        assert rank["refused"] is not None
        assert all(word in rank["refused"] for word in ("0.layer (16, 8)", "fully_shard"))


def test_spikingjellys_tensor_parallel_layers(found: list[dict[str, Any]]) -> None:
    """Built of a masked layer they are refused; built before, each part is N:M and learns."""
    for rank in _of(found, "SpikingJelly, in tensors"):
        for text in rank["refused"]:
            assert text is not None
            assert all(word in text for word in ("3 (8, 8, 3, 3)", "sparsify afterwards"))
        assert rank["fullest"] == 2
        assert rank["moved"] == ["0.weight_logits", "2.weight_logits", "5.weight_logits"]
