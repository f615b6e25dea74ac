# SPDX-License-Identifier: Apache-2.0
"""Other people's trainers, hubs, printers and compilers take sparse and folded models."""

from __future__ import annotations

import pytest
import torch
from export_nets import HandLIF
from forks import failures
from torch import nn

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.pack.kernels import ops


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), HandLIF(), nn.Linear(32, 32), HandLIF(), nn.Linear(32, 4)
    )


def folded() -> nn.Module:
    model = spikenm_fx.sparsify(net(), "2:4", rules=[Rule("re:.*")], method="magnitude")
    return spikenm_fx.fold(model.eval())


ALONE = """
import sys
sys.modules["spikenm_fx"] = None  # what was stored stands by itself
"""
FRESH = {
    "torch.export": ALONE
    + """
import torch
pair = torch.load("pair.pt")
seen = torch.export.load("model.pt2").module()(pair["x"])
assert torch.equal(seen, pair["y"]) and bool(pair["y"].any())
""",
    "engines": """
import torch, spikenm_fx.pack.kernels.ops
pair = torch.load("engine.pt")
program = torch.export.load("engine.pt2")
assert torch.equal(program.module()(pair["x"]), pair["y"]) and bool(pair["y"].any())
assert any("sparse_layer" in str(node.target) for node in program.graph.nodes)
""",
    "AOTInductor": ALONE
    + """
import torch
from torch._inductor import aoti_load_package
pair = torch.load("pair.pt")
seen = aoti_load_package("aot.pt2")(pair["x"])
assert torch.allclose(seen, pair["y"], atol=1e-5)
""",
}
"""What a fresh process does with what was stored, by what has stored it."""


SOON_COMPILED = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # its time is the compiler's


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How loading fails, all from one folder; empty where it does not."""
    from torch._inductor import aoti_compile_and_package

    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    model, x = folded(), torch.rand(2, 3, 16) * 3
    engine = spikenm_fx.pack(folded(), x, backend="fma")
    torch.export.save(torch.export.export(model, (x,)), folder / "model.pt2")
    torch.save({"x": x, "y": model(x).detach()}, folder / "pair.pt")
    torch.export.save(torch.export.export(engine, (x,)), folder / "engine.pt2")
    torch.save({"x": x, "y": engine(x).detach()}, folder / "engine.pt")
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        aoti_compile_and_package(
            program, package_path=str(folder / "aot.pt2"), inductor_configs=SOON_COMPILED
        )
    told = failures(list(FRESH.values()), folder, "torch.export", "torch._inductor.package")
    return dict(zip(FRESH, told, strict=True))


@pytest.mark.slow
def test_torch_export_in_a_fresh_process(failed: dict[str, str]) -> None:
    """A folded model is a program of torch alone."""
    assert failed["torch.export"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fma", "event", "dense"])
def test_an_exported_engine_holds_packed_values_alone(backend, tmp_path, monkeypatch) -> None:
    """Nothing that a kernel reads is stored: other layouts may do so when it is loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.view(-1, 8)[:, 1:] = 0
    x = (torch.rand(5, 256) < 0.3).float()
    engine = spikenm_fx.pack(model.eval(), x, backend=backend)
    packed = sum(layer.packed.nbytes for layer in engine)
    program = torch.export.export(engine, (x,))
    torch.export.save(program, tmp_path / "engine.pt2")
    size = (tmp_path / "engine.pt2").stat().st_size
    dense = sum(w.numel() * 4 for w in model.parameters())
    assert packed <= size < packed + dense / 8
    loaded = torch.export.load(tmp_path / "engine.pt2").module()
    derived = []
    for name in ("layout_for", "unpack_weight"):
        real = getattr(ops, name)

        def watched(*args, real=real, **options):
            derived.append(args)
            return real(*args, **options)

        monkeypatch.setattr(ops, name, watched)
    with torch.no_grad():
        assert torch.equal(loaded(x), engine(x))
        assert torch.equal(loaded(x), engine(x))
    assert len(derived) == 2  # of two layers, once each: now, not when it was stored


@pytest.mark.slow
def test_engines_in_a_fresh_process(failed: dict[str, str]) -> None:
    """An engine's program names this package's operators; with it imported it computes the same."""
    assert failed["engines"] == ""


@pytest.mark.slow
def test_aot_inductor_in_a_fresh_process(failed: dict[str, str]) -> None:
    """Compiled ahead of time, loaded without this package, the same outputs."""
    assert failed["AOTInductor"] == ""


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path) -> None:
    """A module that calls self.net(x): steps are counted, its checkpoint keeps pattern and step."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = spikenm_fx.sparsify(net(), "2:4", total_steps=8)

        def training_step(self, batch, _):
            return self.net(batch[0].transpose(0, 1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.rand(16, 4, 16))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": True}

    def trainer(**options):
        return lightning.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False,
            **quiet, **options,
        )  # fmt: skip

    module = Lit()
    first = trainer(max_epochs=1)
    first.fit(module, loader)
    assert spikenm_fx.progress(module.net).step == 4
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = Lit()
    trainer(max_epochs=2).fit(again, loader, ckpt_path=tmp_path / "half.ckpt")
    assert spikenm_fx.progress(again.net).step == 8
    model = spikenm_fx.fold(again.net.eval())
    assert [str(layer.found) for layer in spikenm_fx.verify(model).layers][1] == "2:4"


def test_hugging_face_hub(tmp_path) -> None:
    """save_pretrained and from_pretrained: pattern, masks and step lie in their own files."""
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, hidden: int = 32, nm: str | None = None) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(16, hidden), HandLIF(), nn.Linear(hidden, hidden), nn.Linear(hidden, 4)
            )
            if nm is not None:
                spikenm_fx.sparsify(self, nm)

        def forward(self, x):
            return self.body(x)

    model, x = Net(nm="2:4"), torch.rand(4, 3, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == [
        "config.json",
        "model.safetensors",
    ]
    again = Net.from_pretrained(tmp_path, strict=True)
    assert spikenm_fx.progress(again).step == 3
    masks = [m.final() for _, _, m in masked_weights(model)]
    assert all(
        torch.equal(mask, other.final())
        for mask, (_, _, other) in zip(masks, masked_weights(again), strict=True)
    )
    assert torch.equal(again.eval()(x), model.eval()(x))
    spikenm_fx.fold(model)
    model.save_pretrained(tmp_path / "folded", config={"hidden": 32})
    plain = Net.from_pretrained(tmp_path / "folded", strict=True)
    assert type(plain.body[2]) is nn.Linear
    assert torch.equal(plain.eval()(x), model(x))


def test_torchinfo_and_print() -> None:
    """Summaries see each layer once, with the dense parameters; print names pattern and method."""
    torchinfo = pytest.importorskip("torchinfo")
    model = spikenm_fx.sparsify(net(), "2:4")
    dense = torchinfo.summary(net(), input_data=torch.rand(4, 3, 16), verbose=0)
    found = torchinfo.summary(model, input_data=torch.rand(4, 3, 16), verbose=0)
    own = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(("logits", "prior")))
    assert dense.total_params == own
    assert len(found.summary_list) == len(dense.summary_list)
    assert found.total_mult_adds >= dense.total_mult_adds
    assert "nm=2:4, method=spikenm" in str(model)


def test_copies_that_tools_write_ones_into() -> None:
    """A copied layer keeps what is assigned to weight.data: counters write ones there."""
    import copy

    model = spikenm_fx.sparsify(net(), "2:4").eval()
    counted = copy.deepcopy(model[2])
    ones = (counted.weight != 0).float()
    counted.weight.data = ones
    x = torch.ones(1, 32)
    assert torch.equal(counted.weight, ones)
    assert int((counted(x) - counted.bias).sum().round()) == int(ones.sum())
    assert not torch.equal(model[2].weight, ones)
