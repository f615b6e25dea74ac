// SPDX-License-Identifier: Apache-2.0
// kernel_driver CASES RESULTS: runs the layer kernels of the lowest ISA level on cases that
// test_aarch64.py writes, so that another processor's results can be compared bit for bit.
#include <cstdio>
#include <cstring>
#include <vector>

#include "abi.h"

namespace {

// Memory for vectors to run over the end of, 64-byte aligned.
struct Array {
  std::vector<char> memory;
  int64_t bytes = 0;

  void *at() {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64;
  }
  void *there() { return bytes ? at() : nullptr; }
  void size(int64_t n) {
    bytes = n;
    memory.assign(static_cast<size_t>(n) + 256, 0);
  }
  bool read(FILE *file) {
    int64_t n = 0;
    if (fread(&n, 8, 1, file) != 1) return false;
    size(n);
    return fread(at(), 1, static_cast<size_t>(n), file) == static_cast<size_t>(n);
  }
  void write(FILE *file) { fwrite(at(), 1, static_cast<size_t>(bytes), file); }
};

enum { kKernel, kBlocks, kKind, kChannelsFirst, kOutBytes, kBitBytes, kNeuron, kHead = 12 };

bool one(FILE *file, FILE *results, const snm_kernels *kernels) {
  int64_t head[kHead];
  snm_geometry geometry;
  if (fread(head, 8, kHead, file) != kHead) return false;
  if (fread(&geometry, sizeof geometry, 1, file) != 1) return false;
  Array input, weights, codes, blocks, bias, scale, rows, v, current, out, bits;
  for (Array *array : {&input, &weights, &codes, &blocks, &bias, &scale, &rows, &v, &current})
    if (!array->read(file)) return false;
  out.size(head[kOutBytes]), bits.size(head[kBitBytes]);
  const int64_t channels = geometry.groups * geometry.og;
  const float *row = static_cast<float *>(rows.at());
  snm_neuron neuron = {};
  const float **fields[] = {&neuron.decay, &neuron.gain, &neuron.drive, &neuron.threshold,
                            &neuron.reset, &neuron.syn_decay, &neuron.syn_gain};
  for (int i = 0; i < 5 + (current.bytes ? 2 : 0); ++i) *fields[i] = row + i * channels;
  neuron.v = static_cast<float *>(v.at()), neuron.current = static_cast<float *>(current.there());
  neuron.kind = static_cast<int32_t>(head[kNeuron + 1]);
  neuron.timing = static_cast<int32_t>(head[kNeuron + 2]);
  neuron.inclusive = static_cast<int32_t>(head[kNeuron + 3]);
  neuron.undecayed = static_cast<int32_t>(head[kNeuron + 4]);
  const snm_call call = {&geometry, input.at(), static_cast<float *>(weights.at()), codes.there(),
                         static_cast<int64_t *>(blocks.at()), head[kBlocks], head[kKind],
                         static_cast<float *>(bias.there()), static_cast<float *>(scale.there()),
                         static_cast<float *>(out.there()), head[kChannelsFirst],
                         static_cast<uint64_t *>(bits.there()), head[kNeuron] ? &neuron : nullptr,
                         1};
  int32_t (*const run[])(const snm_call *) = {kernels->fma, kernels->lut, kernels->event,
                                              kernels->event8};
  if (run[head[kKernel]](&call) != 0) return false;
  for (Array *array : {&out, &bits, &v, &current}) array->write(results);
  return true;
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  FILE *file = fopen(argv[1], "rb"), *results = fopen(argv[2], "wb");
  if (!file || !results) return 2;
  int64_t count = 0;
  if (fread(&count, 8, 1, file) != 1) return 2;
  for (int64_t i = 0; i < count; ++i)
    if (!one(file, results, snm_level(0))) {
      fprintf(stderr, "case %lld cannot be served\n", static_cast<long long>(i));
      return 1;
    }
  return fclose(results) ? 1 : 0;
}
