# SPDX-License-Identifier: Apache-2.0
"""Others that run the same streams: what they are given, and how they are called."""

from __future__ import annotations

import ctypes
import json
import subprocess
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CRuntime", "brainevent_layer", "csr_layers", "onnx_steps"]

Steps = Callable[[], Tensor]

_DRIVER = r"""
#include <stdlib.h>
#include "layers/conv2d_layer.h"
#include "layers/flatten_layer.h"
#include "layers/linear_layer.h"
#include "layers/maxpool2d_layer.h"
#include "layers/spiking_layer.h"
#include "models/lif_neuron.h"

enum { LAYERS = 9 };
static LayerBase *net[LAYERS];

static LayerBase *leaky(size_t n) {
  ModelBase **all = malloc(n * sizeof *all);
  for (size_t i = 0; i < n; ++i) {
    all[i] = calloc(1, sizeof(LIFNeuron));
    lif_initialize((LIFNeuron *)all[i], 0.0f, 1.0f, 0.0f, 0.5f);
  }
  SpikingLayer *layer = calloc(1, sizeof *layer);
  spiking_initialize(layer, n, all);
  return &layer->base;
}

void peer_open(const float *w0, const float *b0, const float *w3, const float *b3,
               const float *w7, const float *b7) {
  Conv2DLayer *first = calloc(1, sizeof *first), *second = calloc(1, sizeof *second);
  MaxPool2DLayer *half = calloc(1, sizeof *half), *again = calloc(1, sizeof *again);
  FlattenLayer *flat = calloc(1, sizeof *flat);
  LinearLayer *last = calloc(1, sizeof *last);
  conv2d_initialize(first, 2, 12, 5, 1, 0, 34);
  maxpool2d_initialize(half, 2, 2, 0, 30, 12);
  conv2d_initialize(second, 12, 32, 5, 1, 0, 15);
  maxpool2d_initialize(again, 2, 2, 0, 11, 32);
  flatten_initialize(flat, 800);
  linear_initialize(last, 800, 10);
  LayerBase *layers[LAYERS] = {&first->base, &half->base, leaky(12 * 15 * 15), &second->base,
                               &again->base, leaky(32 * 5 * 5), &flat->base, &last->base,
                               leaky(10)};
  for (int i = 0; i < LAYERS; ++i) net[i] = layers[i];
  for (int i = 0; i < 12 * 2 * 25; ++i) first->base.weights[i] = w0[i];
  for (int i = 0; i < 32 * 12 * 25; ++i) second->base.weights[i] = w3[i];
  for (int i = 0; i < 10 * 800; ++i) last->base.weights[i] = w7[i];
  for (int i = 0; i < 12; ++i) first->biases[i] = b0[i];
  for (int i = 0; i < 32; ++i) second->biases[i] = b3[i];
  for (int i = 0; i < 10; ++i) last->biases[i] = b7[i];
}

void peer_run(float *frames, int steps, float *counts) {
  for (int i = 0; i < LAYERS; ++i)
    if (net[i]->is_spiking) net[i]->reset_spike_counts(net[i]);
  for (int c = 0; c < 10; ++c) counts[c] = 0;
  for (int t = 0; t < steps; ++t) {
    net[0]->forward(net[0], frames + t * 2 * 34 * 34, 2 * 34 * 34, 0);
    for (int i = 1; i < LAYERS; ++i)
      net[i]->forward(net[i], net[i - 1]->output, net[i - 1]->output_size, 0);
    for (int c = 0; c < 10; ++c) counts[c] += net[LAYERS - 1]->output[c];
  }
}
"""


class CRuntime:
    """The public C runtime of arXiv 2511.12136 on its own N-MNIST network, with given weights.

    Its neurons reset in the step of the spike, and spike at the threshold; snnTorch's reset in the
    next step, and spike above it.  So counts of spikes, and now and then an answer, differ.

    Args:
        source: a checkout of karol-jurzec/snn-generator; its layers and neurons are compiled with
            ``gcc -O3 -march=native``, without what needs Windows or a file format.
        model: its network as snnTorch has it, pruned.
    """

    def __init__(self, source: Path, model: nn.Module) -> None:
        self._folder = tempfile.TemporaryDirectory()
        library, driver = (Path(self._folder.name) / name for name in ("peer.so", "driver.c"))
        driver.write_text(_DRIVER)
        parts = [*source.glob("src/layers/*.c"), *source.glob("src/models/*.c")]
        parts.append(source / "src" / "utils" / "layer_utils.c")
        command = ("gcc", "-O3", "-march=native", "-w", "-shared", "-fPIC", "-o", str(library))
        include = (f"-I{source / 'include'}",)
        subprocess.run([*command, *include, str(driver), *map(str, parts), "-lm"], check=True)
        self._library = ctypes.CDLL(str(library))
        weights = [p.detach().contiguous() for p in model.parameters() if p.numel() > 1]
        self._library.peer_open(*(ctypes.c_void_p(w.data_ptr()) for w in weights))

    def steps(self, frames: Tensor) -> Steps:
        """Runs all steps of each recording, one after another.

        Args:
            frames: ``(steps, batch, 2, 34, 34)``.

        Returns:
            A call that gives the spikes of each class, ``(batch, 10)``.
        """
        whole = frames.transpose(0, 1).contiguous()

        def call() -> Tensor:
            counts = torch.empty(whole.shape[0], 10)
            for one, found in zip(whole, counts, strict=True):
                pointers = ctypes.c_void_p(one.data_ptr()), ctypes.c_void_p(found.data_ptr())
                self._library.peer_run(pointers[0], len(one), pointers[1])
            return counts

        return call


def onnx_steps(model: nn.Module, frames: Tensor) -> Steps:
    """The model's own ONNX file, dense, in onnxruntime, one step a call.

    Args:
        model: at rest.
        frames: ``(steps, batch, ...)``.
    """
    from spikenm_fx.export import onnx

    onnxruntime: Any = import_module("onnxruntime")
    proto = onnx(model, frames[0], check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    told = {p.key: p.value for p in proto.metadata_props}
    rest = json.loads(told.get("spikenm_fx.states", "{}"))
    (name, *states), outs = (p.name for p in session.get_inputs()), session.get_outputs()
    sizes = {p.name: p.shape for p in session.get_inputs()}
    answer = next(p.name for p in outs if not p.name.startswith("new_state."))
    wanted = [answer, *(f"new_{state}" for state in states)]
    given = [frame.numpy() for frame in frames]

    def call() -> Tensor:
        held = [_rest(rest, state, sizes[state]) for state in states]
        total: Any = 0
        for frame in given:
            found, *held = session.run(
                wanted, {name: frame, **dict(zip(states, held, strict=True))}
            )
            total = total + found
        return torch.from_numpy(total)

    return call


def _rest(rest: dict[str, Any], state: str, shape: list[int]) -> Any:
    value = rest.get(state, rest.get(state.removeprefix("state."), 0.0))
    return torch.as_tensor(value, dtype=torch.float32).expand(shape).contiguous().numpy()


def csr_layers(layer: nn.Linear, frames: Tensor) -> dict[str, Steps]:
    """Plain CSR of scipy and of torch for one layer, which sees every input.

    Args:
        layer: pruned.
        frames: ``(steps, 1, inputs)``.
    """
    import scipy.sparse

    weight = layer.weight.detach()
    with_scipy = scipy.sparse.csr_array(weight.numpy())
    with_torch = weight.to_sparse_csr()
    bias = layer.bias.detach()
    columns = [frame[0] for frame in frames]
    arrays = [column.numpy() for column in columns]
    added = bias.numpy()
    return {
        "scipy csr": lambda: torch.from_numpy(sum(with_scipy @ x + added for x in arrays))[None],
        "torch csr": lambda: torch.stack([with_torch @ x + bias for x in columns]).sum(0)[None],
    }


def brainevent_layer(layer: nn.Linear, frames: Tensor) -> Steps | None:
    """Brainevent's connections of fixed number, driven by events; None where it is not installed.

    Args:
        layer: pruned, so that each output has as many kept inputs.
        frames: ``(steps, 1, inputs)`` of zeros and ones.
    """
    try:
        brainevent, jax, jnp = map(import_module, ("brainevent", "jax", "jax.numpy"))
    except ImportError:
        return None
    # In the calling thread, whose time is measured.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    weight = layer.weight.detach()
    kept = int((weight != 0).sum(1).max())
    places = weight.abs().topk(kept, dim=1).indices.sort(dim=1).values
    values = jnp.asarray(weight.gather(1, places).numpy())
    shape = (weight.shape[0], weight.shape[1])
    matrix = brainevent.FixedPostNumConn((values, jnp.asarray(places.numpy())), shape=shape)
    bias = jnp.asarray(layer.bias.detach().numpy())
    run = jax.jit(lambda x: matrix @ brainevent.BinaryArray(x) + bias)
    given = [jnp.asarray(frame[0].numpy() != 0) for frame in frames]

    def call() -> Tensor:
        found = [run(x) for x in given]
        return torch.tensor(jnp.stack(found).sum(0).tolist())[None]

    return call
