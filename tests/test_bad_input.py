# SPDX-License-Identifier: Apache-2.0
"""Each bad input: an error of ours that says what was seen and what to do, and an intact model."""

import copy

import pytest
import torch
from strategies import ALL_LAYERS, network
from torch import nn

import spikenm_fx
from spikenm_fx import Rule, SpikeNMError
from spikenm_fx.masks import Schedule
from spikenm_fx.masks.methods.spikenm import SpikeNM


class Intact:
    """Everything about a model that a failed call must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, self.picture(model)

    @staticmethod
    def picture(model: nn.Module):
        modules = dict(model.named_modules())
        return {
            "tensors": {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
            "classes": {name: type(module) for name, module in modules.items()},
            "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
            "hooks": {
                name: [
                    len(v)
                    for k, v in vars(module).items()
                    if "hook" in k and v is not None and hasattr(v, "__len__")
                ]
                for name, module in modules.items()
            },
            "rng": torch.random.get_rng_state(),
        }

    def check(self) -> None:
        now = self.picture(self.model)
        for part in ("classes", "attributes", "hooks"):
            assert now[part] == self.before[part]
        assert torch.equal(now["rng"], self.before["rng"])
        assert now["tensors"].keys() == self.before["tensors"].keys()
        for key, (identity, value) in now["tensors"].items():
            old_identity, old = self.before["tensors"][key]
            if not key.endswith(
                ("weight_nm", "weight", "weight_eid", "weight_momentum")
            ):  # computed for sparse models
                assert identity == old_identity
            assert torch.equal(value.nan_to_num(), old.nan_to_num())


def nan_weights(value: float = float("nan")) -> nn.Module:
    model = network()
    with torch.no_grad():
        model[2].weight[3, 5] = value
    return model


class Failing(SpikeNM):
    """A method that fails at the second layer."""

    def init_scores(self, weight, draw):
        if weight.shape[0] != 32:
            raise ArithmeticError("second layer")
        return super().init_scores(weight, draw)


BAD_SPARSIFY = {
    "5:4": ({"nm": "5:4"}, ["5:4", "1 <= n <= m"]),
    "0:4": ({"nm": "0:4"}, ["0:4", "1 <= n <= m"]),
    "2:4:8": ({"nm": "2:4:8"}, ["2:4:8", "'n:m'"]),
    "124": ({"nm": 124}, ["124", "YAML", "'2:4'"]),
    "True": ({"nm": True}, ["True", "bool"]),
    "float": ({"nm": 2.4}, ["2.4", "float"]),
    "unicode digits": ({"nm": "٢:٤"}, ["'n:m'"]),
    "pair of floats": ({"nm": (2.0, 4)}, ["2.0", "integers"]),
    "method": ({"method": "spikemn"}, ["spikemn", "did you mean 'spikenm'"]),
    "remainder": ({"remainder": "wrap"}, ["wrap", "skip"]),
    "no such layer": ({"rules": [Rule("body.3")]}, ["body.3", "matches none"]),
    "indivisible": ({"nm": "2:5"}, ["none of the 3", "not a multiple of 5", "pad"]),
    "indivisible error": ({"nm": "2:5", "remainder": "error"}, ["2 (16, 16)", "multiple of 5"]),
    "all dense": ({"rules": [Rule("re:.*", action="keep_dense")]}, ["none of the 3", "keep_dense"]),
    "no steps": ({"total_steps": 0}, ["total_steps=0", "positive integer"]),
    "steps": ({"total_steps": 10.5}, ["10.5", "positive integer"]),
    "method class": ({"method": SpikeNM}, ["SpikeNM", "instance"]),
    "method number": ({"method": 5}, ["method=5", "'srste'"]),
    "one rule": ({"rules": Rule("2")}, ["list of rules"]),
    "rule by name": ({"rules": "2"}, ["rules='2'", "list of rules"]),
    "rules by name": ({"rules": ["2"]}, ["rules=['2']", "list of rules"]),
    "both": ({"total_steps": 10, "schedule": Schedule(10)}, ["not both"]),
    "seed": ({"seed": 1.5}, ["1.5", "integer"]),
    "large seed": ({"seed": 2**64}, [str(2**64), "64 bits"]),
}


@pytest.mark.parametrize("name", BAD_SPARSIFY)
def test_bad_arguments_leave_the_model_alone(name):
    """Bad arguments of sparsify raise a SpikeNMError with value, rule and way out."""
    arguments, says = BAD_SPARSIFY[name]
    model = network()
    intact = Intact(model)
    with pytest.raises(SpikeNMError) as caught:
        spikenm_fx.sparsify(model, **arguments)
    for part in says:
        assert part in str(caught.value)
    intact.check()


@pytest.mark.parametrize(
    "call", [spikenm_fx.plan, spikenm_fx.sparsify, spikenm_fx.fold, spikenm_fx.verify]
)
@pytest.mark.parametrize("found", [5, "model.pt", nn.Linear, None], ids=str)
def test_what_is_no_model(call, found):
    """A file name, a class or nothing in the model's place is named, with what is required."""
    with pytest.raises(SpikeNMError, match=r"needs an nn.Module"):
        call(found)


@pytest.mark.parametrize(
    "options",
    [
        {"std": -1.0},
        {"std": float("nan")},
        {"prior": "3"},
        {"decay": -0.1},
        {"fade": None},
        {"eid": "weight"},
    ],
    ids=str,
)
def test_bad_options_of_the_method(options):
    """They are refused where they are given, with their name and value."""
    ((name, value),) = options.items()
    with pytest.raises(SpikeNMError, match=f"{name}={value!r}"):
        SpikeNM(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(value):
    """Weights that hold NaN or infinity are refused with the layer's name and shape."""
    model = nan_weights(value)
    intact = Intact(model)
    with pytest.raises(SpikeNMError, match=r"2 \(16, 16\) holds NaN or infinity.*finite weights"):
        spikenm_fx.sparsify(model)
    intact.check()


@pytest.mark.parametrize("method", ["spikenm", "srste", "magnitude"])
def test_weights_without_values(method):
    """A model on the meta device has nothing to start from; with memory it can be made sparse."""
    with torch.device("meta"):
        model = network()
    with pytest.raises(SpikeNMError, match=r"2 \(16, 16\) is on the meta device.*to_empty"):
        spikenm_fx.sparsify(model, method=method)
    model.to_empty(device="cpu")
    model.load_state_dict(network(seed=4).state_dict())
    spikenm_fx.sparsify(model, method=method)


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.BatchNorm1d(4)], ids=repr)
def test_no_weight_layers(model):
    """A model without weight layers is refused by its class name."""
    intact = Intact(model)
    with pytest.raises(SpikeNMError, match=f"{type(model).__name__} holds no Linear or Conv"):
        spikenm_fx.sparsify(model)
    intact.check()


@pytest.mark.parametrize("nm", ["2:4", "1:4"])
def test_sparse_twice(nm):
    """Sparsifying twice is refused, also with another pattern, and says how to proceed."""
    model = spikenm_fx.sparsify(network())
    intact = Intact(model)
    with pytest.raises(SpikeNMError, match=r"sparse already \(2 is 2:4\).*fold"):
        spikenm_fx.sparsify(model, nm)
    intact.check()


@pytest.mark.parametrize("call", [spikenm_fx.fold, lambda m: spikenm_fx.param_groups(m, 0.1)])
def test_verbs_that_need_a_sparse_model(call):
    """Fold and param_groups of a dense model name sparsify."""
    model = network()
    intact = Intact(model)
    with pytest.raises(SpikeNMError, match="sparsify"):
        call(model)
    intact.check()


def test_a_foreign_checkpoint():
    """A checkpoint of another pattern is refused before anything is copied."""
    model = spikenm_fx.sparsify(network())
    state = spikenm_fx.sparsify(network(seed=4), "1:4").state_dict()
    intact = Intact(model)
    with pytest.raises(SpikeNMError, match=r"2 \(16, 16\): checkpoint 1:4, model 2:4"):
        model.load_state_dict(state)
    intact.check()


def test_a_method_that_fails_midway():
    """A failure at a later layer leaves no earlier layer masked."""
    model = network()
    intact = Intact(model)
    with pytest.raises(ArithmeticError):
        spikenm_fx.sparsify(model, method=Failing(), rules=ALL_LAYERS)
    intact.check()
    assert not any(hasattr(m, "weight_nm") for m in model.modules())


@pytest.mark.parametrize(
    "arguments",
    [
        {"freeze": 1.0},
        {"freeze": -0.1},
        {"freeze": float("nan")},
        {"kappa": (0.0, 1.0)},
        {"tau": (1.0, -1.0)},
        {"open_steps": 0},
        {"kappa": (1.0, float("nan"))},
        {"tau": (float("inf"), 1.0)},
        {"total_steps": True},
    ],
    ids=str,
)
def test_bad_schedules(arguments):
    """A schedule is checked when it is made."""
    with pytest.raises(SpikeNMError):
        Schedule(**arguments)


def test_a_failed_call_can_be_corrected():
    """After an error the corrected call works on the same model."""
    model = network()
    reference = spikenm_fx.sparsify(copy.deepcopy(model))
    for arguments, _ in BAD_SPARSIFY.values():
        with pytest.raises(SpikeNMError):
            spikenm_fx.sparsify(model, **arguments)
    spikenm_fx.sparsify(model)
    assert torch.equal(model[2].weight, reference[2].weight)
