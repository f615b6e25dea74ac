# SPDX-License-Identifier: Apache-2.0
"""Forms of one engine, timed beside the model: the whole forward decides which of them runs.

A layer that is faster in its kernel may be paid for elsewhere: tensors that wait cost Python's time
at each view of them, which small networks do not win back.  So the whole forward is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_map
from spikenm_fx.pack.engine.fused import fuse_neuron, release_neuron
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.summary import GAINS, WholeForward
from spikenm_fx.pack.turns import rounds, runs_of, spent_in, typical
from spikenm_fx.state import preserved

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

        Where no form is faster than the model that is torch's layers, which cost what they did.

        Args:
            reference: a copy of the model.
            args: of one forward.
        """
        forms, seconds = self._forms(), {}
        engine = self.builder.engine
        leave = self.builder.fixed_tensors()
        with torch.no_grad(), preserved(engine, guarded=False, leave=leave) as rest:
            seconds = self._take_turns(forms, reference, args, rest)
        milliseconds = {way: 1e3 * typical(runs) for way, runs in seconds.items()}
        best = min(forms, key=milliseconds.__getitem__)
        if "torch" in forms and milliseconds[best] * GAINS > milliseconds[MODEL]:
            best = "torch"  # nothing is gained: then nothing but torch's own layers runs
        whole = WholeForward(milliseconds[MODEL], milliseconds[best], best)
        self._apply(forms[best])
        self._note(best, milliseconds)
        return whole

    def finish(self) -> None:
        """Let what leaves the engine be ordinary tensors, where it may be anything else."""
        self._catch_lazy()

    def _forms(self) -> dict[str, _Form]:
        layers = {name: draft.packed for name, draft in self.builder.layers.items()}
        waits = {name: layer.waits for name, layer in layers.items()}
        quiet = dict.fromkeys(layers, False)
        now = {}
        for name, layer in layers.items():
            now[name] = PackedLayer(layer.packed, layer.bias, choice="reference")
            now[name].adopt(layer)
        dense = {name: PackedLayer(layer.packed, layer.bias) for name, layer in layers.items()}
        plainly = {n: dense[n] if now[n].choice == "dense" else now[n] for n in layers}
        forms = {"fused": _Form(now, waits, fused=True)}
        if any(waits.values()) or self.builder.fused:
            forms["unfused"] = _Form(plainly, quiet, fused=False)
        if any(layer.choice != "dense" for layer in layers.values()):
            forms["torch"] = _Form(dense, quiet, fused=False)
        return forms

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
                    module(*args)  # caches are warm, as in any loop over batches
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
        if best == "fused":
            return
        fused = f"{milliseconds['fused']:.3g} ms fused, {milliseconds[best]:.3g} ms without"
        reason = f"The whole forward is faster without fusing it ({fused}); nothing is to be done."
        if milliseconds["fused"] <= milliseconds[best]:
            fused = f"{milliseconds['fused']:.3g} ms, the model's {milliseconds[MODEL]:.3g} ms"
            reason = f"The whole forward gains nothing by fusing it ({fused}); keep your model."
        for name in self.builder.fused:
            self.builder.neurons[name] = reason
        self.builder.fused.clear()
        for draft in self.builder.layers.values():
            if draft.neuron:
                draft.note = f"Its neuron {draft.neuron} is not fused with it. {reason}"
            draft.neuron = ""


def _plain_outputs(_engine: nn.Module, _args: Any, output: Any) -> Any:
    """What leaves the engine is ordinary tensors."""
    if type(output) is Tensor or torch.compiler.is_compiling():
        return output
    return tree_map(lambda x: x.materialize() if isinstance(x, LazyTensor) else x, output)
