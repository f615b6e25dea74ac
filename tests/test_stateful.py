# SPDX-License-Identifier: Apache-2.0
"""Everything that users do with a sparse model, in any order: what must hold holds at any moment.

``SPIKENM_FX_EXAMPLES`` sets how many orders are tried.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from loops import heard, masked_modules, refused, same, sequences, spiking_net, train_step
from strategies import ALL_LAYERS
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.pattern import NM

EXAMPLES = int(os.environ.get("SPIKENM_FX_EXAMPLES", "12"))
METHODS: dict[str, Any] = {
    "spikenm": SpikeNM(eid=EID(every=2), fade=0.0),
    "spikenm, fading": SpikeNM(eid=EID(every=3)),
    "spikenm, no EID": SpikeNM(eid=None),
    **{name: name for name in ("magnitude", "srste", "maskllm", "regrow", "cyclical", "random")},
}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class SparseModel(RuleBasedStateMachine):
    """One sparse model and its optimizer, and what is done with both."""

    @initialize(
        nm=st.sampled_from(["1:4", "2:4", "1:2", "2:8"]),
        method=st.sampled_from(sorted(METHODS)),
        by=st.sampled_from(sorted(OPTIMIZERS)),
        total_steps=st.sampled_from([12, 40]),
        permuted=st.booleans(),
    )
    def sparsify(self, nm: str, method: str, by: str, total_steps: int, permuted: bool) -> None:
        self.nm, self.method, self.by, self.total_steps = nm, method, by, total_steps
        self.dtype, self.count = torch.float32, 0
        self.model = spiking_net()
        if permuted:
            x = self.batch()
            before = self.model(x)
            with heard():
                spikenm_fx.permute(self.model, x, nm)
            torch.testing.assert_close(self.model(x), before)
        self.masked(self.model)
        self.renew_optimizer()

    def masked(self, model: nn.Module) -> nn.Module:
        options = {"method": METHODS[self.method], "total_steps": self.total_steps}
        with heard():
            return spikenm_fx.sparsify(model, self.nm, rules=ALL_LAYERS, **options).train()

    def renew_optimizer(self) -> None:
        self.optimizer = OPTIMIZERS[self.by](self.model.parameters())

    def batch(self) -> Tensor:
        self.count += 1
        return sequences(1, seed=self.count)[0].to(self.dtype)

    @rule(steps=st.integers(1, 4))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            with heard():
                train_step(self.model, self.optimizer, self.batch())

    @rule()
    def evaluate(self) -> None:
        x = self.batch()
        before = copied(self.model.state_dict())
        answers = [self.answer(self.model, x) for _ in range(2)]
        assert torch.equal(*answers)
        assert same(copied(self.model.state_dict()), before)

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        mode = model.training
        with torch.no_grad(), heard():
            found = model.eval()(x)
        model.train(mode)
        return found

    @rule(way=st.sampled_from(["deepcopy", "pickle", "state dict", "torch.save"]))
    def copy(self, way: str) -> None:
        """The copy is the same, and goes on as the model does; whoever goes on is the model."""
        twin = self.twin(way)
        others = OPTIMIZERS[self.by](twin.parameters())
        others.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        x = self.batch()
        assert torch.equal(self.answer(twin, x), self.answer(self.model, x))
        for model, optimizer in ((self.model, self.optimizer), (twin, others)):
            with heard():
                train_step(model, optimizer, x)
        assert same(copied(twin.state_dict()), copied(self.model.state_dict()))
        self.model, self.optimizer = twin, others

    def twin(self, way: str) -> nn.Module:
        if way == "deepcopy":
            return copy.deepcopy(self.model)
        if way == "pickle":
            return pickle.loads(pickle.dumps(self.model))
        state = self.model.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        twin = self.masked(spiking_net(seed=3)).to(self.dtype)  # scores are cast, too
        twin.load_state_dict(state)
        return twin

    @rule(dtype=st.sampled_from(sorted(DTYPES)))
    def cast(self, dtype: str) -> None:
        self.dtype = DTYPES[dtype]
        self.model.to(self.dtype)
        self.renew_optimizer()

    @rule(packed=st.booleans())
    def fold(self, packed: bool) -> None:
        """Of a copy: the same network in evaluation, N:M, packed or not; the model stays."""
        before = copied(self.model.state_dict())
        x = self.batch()
        folded = copy.deepcopy(self.model)
        expected = self.answer(folded, x)
        with heard():
            spikenm_fx.fold(folded)
            assert torch.equal(self.answer(folded, x), expected)
            assert spikenm_fx.verify(folded, dict.fromkeys(masked_modules(self.model), self.nm))
            assert folded.state_dict().keys() == spiking_net().state_dict().keys()
            if packed and self.dtype is torch.float32:
                engine = spikenm_fx.pack(folded.eval(), x, backend="reference")
                torch.testing.assert_close(engine(x), expected, rtol=1e-3, atol=1e-4)
        assert same(copied(self.model.state_dict()), before)

    @rule()
    def permute(self) -> None:
        """A sparse model is refused and left alone, or computes what it did."""
        before, x = copied(self.model.state_dict()), self.batch()
        expected = self.answer(self.model, x)
        if refused(lambda: spikenm_fx.permute(self.model, x, self.nm)) is not None:
            assert same(copied(self.model.state_dict()), before)
        torch.testing.assert_close(self.answer(self.model, x), expected)

    @rule()
    def sparsify_again(self) -> None:
        before = copied(self.model.state_dict())
        assert refused(lambda: spikenm_fx.sparsify(self.model, self.nm)) is not None
        assert same(copied(self.model.state_dict()), before)

    @invariant()
    def evaluated_weights_are_sparse(self) -> None:
        """At most N non-zeros in each block of M, at every moment."""
        if not hasattr(self, "model"):
            return
        pattern, mode = NM.parse(self.nm), self.model.training
        with torch.no_grad(), heard():
            for name, layer in masked_modules(self.model.eval()).items():
                kept = (layer.weight != 0).unflatten(1, (-1, pattern.of)).sum(-1)
                assert int(kept.max()) <= pattern.keep, name
        self.model.train(mode)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


TestSparseModel = SparseModel.TestCase
TestSparseModel.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=8, deadline=None, print_blob=True
)


def test_a_model_that_was_cast_goes_on_as_one_into_which_its_state_is_loaded() -> None:
    """The spread of its logits is that of the new dtype, down to the last bit."""
    case = SparseModel()
    SparseModel.sparsify(case, "1:2", "spikenm", "Adam", 12, permuted=False)
    SparseModel.cast(case, "float64")
    SparseModel.copy(case, "state dict")
