# SPDX-License-Identifier: Apache-2.0
"""Forms of one engine, timed beside the model: the whole forward decides which of them runs.

A layer that is faster in its kernel may be paid for elsewhere: tensors that wait cost Python's time
at each view of them, which small networks do not win back.  So the whole forward is measured, twice
where it seems to gain: the fastest of several is partly the luckiest.  Where it gains nothing,
layers become the model's own again, those first that saved least, until the rest gains; where that
is none, nothing but the model's own code is left, which costs what it costs by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_map
from spikenm_fx.pack.engine.choose import LayerDraft
from spikenm_fx.pack.engine.fused import fuse_neuron, release_neuron
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.summary import GAINS, WholeForward
from spikenm_fx.pack.turns import rounds, runs_of, spent_in, typical
from spikenm_fx.state import as_given, preserved

if TYPE_CHECKING:
    from spikenm_fx.pack.builder import EngineBuilder

__all__ = ["Forms"]

LONG = 0.05  # seconds of a forward that does not show whether caches were warm before
MODEL = "model"


@dataclass(slots=True)
class _Form:
    """How each layer runs, whether it waits, and whether neurons are fused."""

    layers: dict[str, PackedLayer]
    waits: dict[str, bool]
    fused: bool


class Forms:
    """The forms of a builder's engine.

    Args:
        builder: all layers replaced and neurons fused.
    """

    def __init__(self, builder: EngineBuilder) -> None:
        self.builder = builder
        self._hook: Any = None

    def fastest(self, reference: nn.Module, args: tuple[Any, ...]) -> WholeForward:
        """Time the forms and the model in turn, and leave the engine in the fastest form.

        Where none is faster than the model, layers that gain little become the model's own again,
        in the end all of them.  Weights that were rounded on demand stay, whatever they cost.

        Args:
            reference: a copy of the model.
            args: of one forward.
        """
        forms = self._forms()
        seen = self._milliseconds(forms, reference, args)
        best = min(forms, key=seen.__getitem__, default="")
        whole = self._gaining(best, forms, seen, reference, args) if best else None
        if whole is None and best and self.builder.dtype is not None:
            whole = WholeForward(seen[MODEL], seen[best], best)
        if whole is not None:
            self._apply(forms[best])
            self._note(best, seen)
            return whole
        return self._some(seen, reference, args) or self._none(seen)

    def _gaining(
        self,
        name: str,
        forms: dict[str, _Form],
        seen: dict[str, float],
        reference: nn.Module,
        args: tuple[Any, ...],
    ) -> WholeForward | None:
        """What a form gains, measured once more; None where it gains nothing, then or now."""
        if seen[name] * GAINS > seen[MODEL]:
            return None
        again = self._milliseconds({name: forms[name]}, reference, args)
        if again[name] * GAINS > again[MODEL]:
            return None
        return WholeForward(again[MODEL], again[name], name)

    def _some(
        self, seen: dict[str, float], reference: nn.Module, args: tuple[Any, ...]
    ) -> WholeForward | None:
        """Pack only the layers that save most, by halves; None where the whole never gains."""
        builder = self.builder
        saved = {name: _saved(draft) for name, draft in builder.layers.items()}
        kept = sorted((n for n in saved if saved[n] > 0), key=saved.__getitem__, reverse=True)
        fused = seen.get("fused", math.inf) < seen.get("unfused", math.inf)
        while kept and sum(saved[name] for name in kept) > (1 - 1 / GAINS) * seen[MODEL]:
            if not fused:
                self._release(seen)
            for name in [name for name in builder.layers if name not in kept]:
                builder.leave(name, self._without(seen))
            forms = {"some": self._form(fused=fused)}
            now = self._milliseconds(forms, reference, args)
            whole = self._gaining("some", forms, now, reference, args)
            if whole is not None:
                self._apply(forms["some"])
                return whole
            del kept[len(kept) // 2 :]
        return None

    def _none(self, seen: dict[str, float]) -> WholeForward:
        """Leave nothing but the model's own code, which takes what the model's takes."""
        self.builder.leave_everything(f"{self._without(seen)} Keep your model.")
        return WholeForward(seen[MODEL], seen[MODEL], "torch")

    def _without(self, seen: dict[str, float]) -> str:
        best = min((seen[way] for way in seen if way != MODEL), default=seen[MODEL])
        times = f"{best:.3g} ms with the fastest form, the model's {seen[MODEL]:.3g} ms"
        return f"The whole forward gains nothing by packing it ({times}); it is the model's own."

    def finish(self) -> None:
        """Let what leaves the engine be ordinary tensors, where it may be anything else."""
        self._catch_lazy()

    def _forms(self) -> dict[str, _Form]:
        """By name those in which something may gain."""
        drafts = self.builder.layers
        packs = any(draft.packed.choice != "dense" for draft in drafts.values())
        folds = any(draft.norm is not None for draft in drafts.values())
        fuses = bool(self.builder.fused) or any(draft.packed.waits for draft in drafts.values())
        rounds = self.builder.dtype is not None
        forms = {"fused": self._form(fused=True)} if packs or folds or fuses or rounds else {}
        if fuses and (packs or folds):
            forms["unfused"] = self._form(fused=False)
        if packs and folds:
            dense = {n: PackedLayer(d.packed.packed, d.packed.bias) for n, d in drafts.items()}
            forms["dense"] = _Form(dense, dict.fromkeys(drafts, False), fused=False)
        return forms

    def _form(self, *, fused: bool) -> _Form:
        """The layers as they run now, with the neurons that are fused or without."""
        layers, waits = {}, {}
        for name, draft in self.builder.layers.items():
            layer, waits[name] = draft.packed, fused and draft.packed.waits
            made = PackedLayer(layer.packed, layer.bias, choice="reference")
            if layer.choice == "dense" and not fused:
                made.choose("dense")  # in the memory format of its input
            else:
                made.adopt(layer)
            layers[name] = made
        return _Form(layers, waits, fused=fused)

    def _milliseconds(
        self, forms: dict[str, _Form], reference: nn.Module, args: tuple[Any, ...]
    ) -> dict[str, float]:
        """Of the model and of each form."""
        leave = self.builder.fixed_tensors()
        with torch.no_grad(), preserved(self.builder.engine, guarded=False, leave=leave) as rest:
            seconds = self._take_turns(forms, reference, args, rest)
        return {way: 1e3 * typical(runs) for way, runs in seconds.items()}

    def _take_turns(
        self,
        forms: dict[str, _Form],
        reference: nn.Module,
        args: tuple[Any, ...],
        rest: Callable[[], None],
    ) -> dict[str, list[float]]:
        engine, ways = self.builder.engine, (MODEL, *forms)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        runs, slow = 0, 0.0
        for counted in rounds():
            for way in ways:
                if way != MODEL:
                    rest()  # state lies in memory as the form that made it left it
                    self._apply(forms[way])
                module = reference if way == MODEL else engine
                if slow < LONG:
                    module(*as_given(args))  # caches are warm, as in any loop over batches
                runs = runs or runs_of(module, args)
                spent = spent_in(module, args, runs)
                slow = max(slow, spent)
                if counted:
                    seconds[way].append(spent)
        return seconds

    def _apply(self, form: _Form) -> None:
        for name, draft in self.builder.layers.items():
            draft.packed.waits = form.waits[name]
            draft.packed.adopt(form.layers[name])
        for name, spec in self.builder.fused.items():
            module = self.builder.engine.get_submodule(name)
            if form.fused:
                fuse_neuron(module, spec)
            else:
                release_neuron(module)
        self._catch_lazy()

    def _catch_lazy(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        waits = any(draft.packed.waits for draft in self.builder.layers.values())
        self._hook = self.builder.engine.register_forward_hook(_plain_outputs) if waits else None

    def _note(self, best: str, milliseconds: dict[str, float]) -> None:
        if best != "fused":
            self._release(milliseconds)

    def _release(self, seen: dict[str, float]) -> None:
        """Say of neurons why they are not fused."""
        best = min(seen[way] for way in seen if way not in (MODEL, "fused"))
        fused = f"{seen['fused']:.3g} ms fused, {best:.3g} ms without"
        reason = f"The whole forward is faster without fusing it ({fused}); nothing is to be done."
        for name in list(self.builder.fused):
            self.builder.unfuse(name, reason)


def _saved(draft: LayerDraft) -> float:
    """Milliseconds of one forward that a layer saves."""
    seen = draft.milliseconds
    return seen.get("dense", 0.0) - seen.get(draft.packed.choice, seen.get("dense", 0.0))


def _plain_outputs(_engine: nn.Module, _args: Any, output: Any) -> Any:
    """What leaves the engine is ordinary tensors."""
    if type(output) is Tensor or torch.compiler.is_compiling():
        return output
    return tree_map(lambda x: x.materialize() if isinstance(x, LazyTensor) else x, output)
