# SPDX-License-Identifier: Apache-2.0
"""Permuted channels: efficacy on random matrices, and what N:M keeps in whole models."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.bench.measure import RESULTS, save
from spikenm_fx.bench.permutation import in_double, outputs_of
from spikenm_fx.bench.short_run import add_options, data_of, fit
from spikenm_fx.bench.zoo import ZOO, Case
from spikenm_fx.channels import Permutation, apply_permutation, plan_permutation
from spikenm_fx.channels.search import Scored, best_order, kept
from spikenm_fx.demo.networks import direct_code
from spikenm_fx.pattern import NM

__all__ = ["MODELS", "efficacy", "main"]

MODELS = (
    *(f"spikingjelly/{n}/m" for n in ("spiking_resnet18", "sew_resnet18", "sew_resnet50")),
    *(f"spikingjelly/{n}/m" for n in ("ms_resnet18", "spiking_vgg11_bn", "spikformer")),
    *("spikingjelly/sdt/m", "spikingjelly/qkformer/m", "snntorch/conv", "snntorch/rleaky"),
    *("norse/loop", "sinabs/from_model", "sinabs/recurrent"),
)


def efficacy(part: Scored, order: Tensor) -> float:
    """Which share of the loss that could be avoided is: apex's measure of a permutation.

    ``(lost before - lost after) / (lost before - lost by unstructured pruning of the same size)``.
    """
    scores = part.scores.double()
    most = scores.flatten().topk(int(scores.numel() * part.nm.density)).values.sum()
    before = kept(part)
    return (kept(part, order) - before) / (float(most) - before)


def _random_matrices(patterns: list[str], seeds: int) -> list[dict[str, Any]]:
    rows = []
    for pattern in patterns:
        for native in (True, False):
            found, seconds = [], []
            for seed in range(seeds):
                matrix = torch.rand(64, 128, generator=torch.Generator().manual_seed(seed))
                part = Scored(matrix.T.contiguous(), NM.parse(pattern))
                start = time.process_time()
                order = best_order([part], 128, seed=seed, native=native)
                seconds.append(time.process_time() - start)
                found.append(efficacy(part, order))
            rows.append(
                {
                    "nm": pattern,
                    "search": "kernel" if native else "torch",
                    "efficacy": statistics.mean(found),
                    "least": min(found),
                    "seconds": statistics.median(seconds),
                }
            )
            print(
                f"{pattern} {rows[-1]['search']}: {statistics.mean(found):.1%} (least "
                f"{min(found):.1%}), {statistics.median(seconds):.3f} s"
            )
    return rows


def _model(name: str, pattern: str) -> dict[str, Any]:
    case = ZOO[name].build()
    start, wall = time.process_time(), time.perf_counter()
    found = plan_permutation(case.model, case.inputs, pattern)
    row = {
        "model": name,
        "nm": pattern,
        "seconds": time.process_time() - start,
        "wall": time.perf_counter() - wall,
        **_shares(found),
        "difference": _difference(case, found),
    }
    print(
        "{model} {nm}: {kept_before:.2%} -> {kept_after:.2%} kept, {groups_moved} of {groups} "
        "groups, {channels_moved:.1%} of the inner channels moved, {channels_free:.1%} free, "
        "outputs differ by {difference:.1e}, {seconds:.2f} s of processor time".format(**row)
    )
    return row


def _shares(found: Permutation) -> dict[str, Any]:
    weight = sum(entry.total for entry in found.groups) or 1.0  # no N:M weight reads any
    inside = [e for e in found.groups if "output of the model" not in e.reason]
    channels = sum(entry.group.size for entry in inside)
    return {
        "groups": len(found.groups),
        "groups_moved": len(found.moved),
        "kept_before": sum(e.kept_before for e in found.groups) / weight,
        "kept_after": sum(e.kept_after for e in found.groups) / weight,
        "channels_moved": sum(e.group.size for e in found.moved) / channels,
        "channels_free": sum(e.group.size for e in inside if not e.group.frozen) / channels,
        "reasons": sorted({e.reason for e in found.groups if e.reason}),
    }


def _difference(case: Case, found: Permutation) -> float:
    """Of the outputs before and after, in float64 where the framework knows it."""
    with in_double(case) as (exactly, _):
        before = outputs_of(exactly)
        apply_permutation(exactly.model, found)
        after = outputs_of(exactly)
    return max(float((x - y).abs().max()) for x, y in zip(before, after, strict=True))


TRAINED = MODELS[:2] + MODELS[3:8]
"""Models of SpikingJelly that train on CIFAR-10 within minutes."""


def _trained_models(arguments: list[str]) -> None:
    """Train each model a little, and see what N:M keeps of its weights before and after."""
    parser = argparse.ArgumentParser(prog="bench permute trained")
    add_options(parser, epochs=2)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--models", nargs="*", default=list(TRAINED), help="names of the zoo")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    data, rows = data_of(options), []
    for name in options.models:
        case = ZOO[name].build()

        def scores(model: nn.Module, coded: Tensor, case: Case = case) -> Tensor:
            case.reset(model)
            out: Tensor = model(coded)
            return out.mean(0) if out.ndim == 3 else out

        fit(case.model, data, options, scores=scores)
        case.reset(case.model.eval())
        coded = direct_code(data.test_images[: options.batch], options.steps)
        with torch.no_grad():
            right = [
                scores(case.model, direct_code(images, options.steps)).argmax(1)
                for images in data.test_images.split(options.batch)
            ]
        case.reset(case.model)
        accuracy = float((torch.cat(right) == data.test_labels).float().mean())
        for pattern in options.patterns:
            found = plan_permutation(case.model, coded, pattern)
            rows.append({"model": name, "nm": pattern, "accuracy": accuracy, **_shares(found)})
            print(
                "{model} {nm}: {accuracy:.1%}, {kept_before:.2%} -> {kept_after:.2%} kept".format(
                    **rows[-1]
                ),
                flush=True,
            )
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(save("permute-trained", {"settings": settings, "rows": rows}, RESULTS))


def main(arguments: list[str]) -> int:
    """Measure, print, and write the figures as JSON; ``trained --data DIR``: of trained models."""
    if arguments[:1] == ["trained"]:
        _trained_models(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(prog="bench permute", description=__doc__)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "2:8", "1:8"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="names of the zoo")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    patterns = [str(NM.parse(p)) for p in options.patterns]
    result = {
        "matrices": _random_matrices(patterns, options.seeds),
        "models": [_model(n, p) for n in options.models for p in patterns[:2]],
    }
    if options.json:
        save(options.json.stem, result, options.json.parent)
    return 0
