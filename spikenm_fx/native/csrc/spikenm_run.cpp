// SPDX-License-Identifier: Apache-2.0
// spikenm-run NET.snm INPUT.npy ...: the network's output as text, one line per sample.
// spikenm-run NET.snm: a stream, one time step of little-endian floats after another on standard
// input, and one line per step on standard output.  A step of a network of several inputs is one
// step of each, in order.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "spikenm.h"

namespace {

constexpr const char *kUsage =
    "usage: spikenm-run NET.snm INPUT.npy ...  run a whole input (float32, C order), or several\n"
    "       spikenm-run NET.snm                run a stream: one step of floats after another on\n"
    "                                          standard input\n";

int wrong(const char *what, const char *why) {
  fprintf(stderr, "spikenm-run: %s: %s\n", what, why);
  return 1;
}

void print(const spikenm_net *net) {
  for (int32_t i = 0; i < spikenm_outputs(net); ++i) {
    int64_t shape[SPIKENM_RANK] = {}, size = 1;
    int32_t rank = 0;
    const float *y = spikenm_output(net, i, shape, &rank);
    for (int32_t k = 0; k < rank; ++k) size *= shape[k];
    const int64_t line = rank ? shape[rank - 1] : 1;
    for (int64_t k = 0; y && k < size; ++k)
      printf("%.9g%c", static_cast<double>(y[k]), (k + 1) % line ? ' ' : '\n');
  }
  fflush(stdout);
}

// The header of an .npy file (version 1 or 2): a Python dictionary with three known keys.
bool read_npy(FILE *file, std::vector<int64_t> *shape, std::vector<float> *x, const char **why) {
  unsigned char head[12] = {};
  *why = "it is no .npy file";
  if (fread(head, 1, 10, file) != 10 || memcmp(head, "\x93NUMPY", 6) != 0) return false;
  size_t size = head[8] | static_cast<size_t>(head[9]) << 8;
  if (head[6] >= 2) {
    if (fread(head + 10, 1, 2, file) != 2) return false;
    size |= static_cast<size_t>(head[10]) << 16 | static_cast<size_t>(head[11]) << 24;
  }
  if (size > 1 << 16) return false;
  std::string text(size, ' ');
  if (fread(&text[0], 1, size, file) != size) return false;
  *why = "it holds something else than float32 in C order: save numpy.float32";
  if (text.find("'<f4'") == std::string::npos ||
      text.find("'fortran_order': False") == std::string::npos)
    return false;
  *why = "its shape cannot be read";
  const size_t at = text.find("'shape': (");
  if (at == std::string::npos) return false;
  int64_t count = 1;
  for (const char *p = text.c_str() + at + 10; *p != ')';) {
    char *end = nullptr;
    const long long n = strtoll(p, &end, 10);
    if (end == p || n < 0 || shape->size() == SPIKENM_RANK ||
        __builtin_mul_overflow(count, n, &count) || count > (1ll << 31))
      return false;
    shape->push_back(n);
    for (p = end; *p == ',' || *p == ' ';) ++p;
  }
  *why = "it is shorter than its shape says";
  x->resize(static_cast<size_t>(count) + 1);
  return fread(x->data(), sizeof(float), static_cast<size_t>(count), file) ==
         static_cast<size_t>(count);
}

// Inputs in order, as the library takes them.
struct Inputs {
  std::vector<int64_t> shapes[SPIKENM_INPUTS];
  std::vector<float> x[SPIKENM_INPUTS];
  const int64_t *shape_at[SPIKENM_INPUTS];
  const float *x_at[SPIKENM_INPUTS];
  int32_t ranks[SPIKENM_INPUTS];

  void point(int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
      shape_at[i] = shapes[i].data(), x_at[i] = x[i].data();
      ranks[i] = static_cast<int32_t>(shapes[i].size());
    }
  }
};

int run_files(spikenm_net *net, int32_t count, char **paths) {
  Inputs in;
  char message[SPIKENM_MESSAGE] = "";
  if (count > SPIKENM_INPUTS) return wrong(paths[SPIKENM_INPUTS], "there are too many inputs");
  for (int32_t i = 0; i < count; ++i) {
    const char *why = "it cannot be opened";
    FILE *file = fopen(paths[i], "rb");
    const bool well = file && read_npy(file, &in.shapes[i], &in.x[i], &why);
    if (file) fclose(file);
    if (!well) return wrong(paths[i], why);
    in.shapes[i].reserve(1);  // a pointer even where it has no axis
  }
  in.point(count);
  if (spikenm_run_all(net, count, in.x_at, in.shape_at, in.ranks, message))
    return wrong(paths[0], message);
  print(net);
  return 0;
}

int run_stream(spikenm_net *net) {
  Inputs in;
  const int32_t count = spikenm_inputs(net);
  for (int32_t k = 0; k < count; ++k) {
    int64_t shape[SPIKENM_RANK] = {}, size = 1;
    int32_t time = -1, is_free[SPIKENM_RANK] = {};
    const int32_t axes = spikenm_input_at(net, k, shape, &time, is_free);
    in.shapes[k].reserve(1);
    for (int32_t i = 0; i < axes; ++i) {
      if (i == time) continue;
      in.shapes[k].push_back(is_free[i] ? 1 : shape[i]);  // one stream
      size *= in.shapes[k].back();
    }
    in.x[k].resize(static_cast<size_t>(size) + 1);
  }
  in.point(count);
  char message[SPIKENM_MESSAGE] = "";
  for (;;) {
    for (int32_t k = 0; k < count; ++k) {
      const size_t size = in.x[k].size() - 1;
      const size_t got = fread(in.x[k].data(), sizeof(float), size, stdin);
      if (got == 0 && k == 0) return 0;
      if (got != size) return wrong("standard input", "it ends in the middle of a time step");
    }
    if (spikenm_step_all(net, count, in.x_at, in.shape_at, in.ranks, message))
      return wrong("a time step", message);
    print(net);
  }
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2 || strcmp(argv[1], "--help") == 0) {
    fputs(kUsage, argc == 2 ? stdout : stderr);
    return argc == 2 ? 0 : 2;
  }
  char message[SPIKENM_MESSAGE] = "";
  spikenm_net *net = spikenm_open(argv[1], message);
  if (!net) return wrong(argv[1], message);
  const int code = argc > 2 ? run_files(net, argc - 2, argv + 2) : run_stream(net);
  spikenm_close(net);
  return code;
}
