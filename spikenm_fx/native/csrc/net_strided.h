// SPDX-License-Identifier: Apache-2.0
// Products, sums and copies along any axes of a token: nested loops over numbers at fixed distances.
#pragma once
#include "net.h"
#include "simd.h"

namespace {

struct Strided {
  int64_t mode, loops, size[kStridedLoops], to[kStridedLoops], a[kStridedLoops], b[kStridedLoops];

  explicit Strided(const int64_t *w) : mode(w[kMode]), loops(w[kStridedCount]) {
    for (int64_t i = 0; i < loops; ++i) {
      const int64_t *loop = w + kStridedLoop + 4 * i;
      size[i] = loop[0], to[i] = loop[1], a[i] = loop[2], b[i] = loop[3];
    }
  }

  // Adds to y, which starts as zeros.
  void run(const float *x, const float *z, float *y) const {
    if (loops == 1) return inner(x, z, y);
    outer(0, x, z, y);
  }

 private:
  void outer(int64_t at, const float *x, const float *z, float *y) const {
    for (int64_t i = 0; i < size[at]; ++i, x += a[at], z += b[at], y += to[at])
      if (at + 2 == loops) inner(x, z, y);
      else outer(at + 1, x, z, y);
  }

  void inner(const float *x, const float *z, float *y) const {
    const int64_t k = loops - 1, n = size[k];
    if (mode == kCopy) return copies(x, y, n, a[k], to[k]);
    if (mode == kMul && to[k] == 1 && a[k] == 0 && b[k] == 1) return multiples(*x, z, y, n);
    if (mode == kMul && to[k] == 1 && a[k] == 1 && b[k] == 0) return multiples(*z, x, y, n);
    if (mode == kMul && to[k] == 0 && a[k] == 1 && b[k] == 1) return product(x, z, y, n);
    if (to[k] == 1 && a[k] == 1 && b[k] == 1) return pairs(x, z, y, n);
    for (int64_t i = 0; i < n; ++i) y[i * to[k]] += one(x[i * a[k]], z[i * b[k]]);
  }

  float one(float x, float z) const {
    return mode == kAdd ? x + z : mode == kSub ? x - z : mode == kMul ? x * z : (1 - x) * z;
  }

  void pairs(const float *x, const float *z, float *y, int64_t n) const {
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
      storeu(y + i, loadu(y + i) + joined(mode, loadu(x + i), loadu(z + i)));
    for (; i < n; ++i) y[i] += one(x[i], z[i]);
  }

  static void multiples(float factor, const float *x, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + VW <= n; i += VW) storeu(y + i, madd(splat(factor), loadu(x + i), loadu(y + i)));
    for (; i < n; ++i) y[i] += factor * x[i];
  }

  static void product(const float *x, const float *z, float *y, int64_t n) {
    vf sum = {};
    int64_t i = 0;
    for (; i + VW <= n; i += VW) sum = madd(loadu(x + i), loadu(z + i), sum);
    float whole = 0;
    for (int k = 0; k < VW; ++k) whole += sum[k];
    for (; i < n; ++i) whole += x[i] * z[i];
    *y += whole;
  }

  static void copies(const float *x, float *y, int64_t n, int64_t from, int64_t to) {
    int64_t i = 0;
    if (from == 1 && to == 1)
      for (; i + VW <= n; i += VW) storeu(y + i, loadu(y + i) + loadu(x + i));
    for (; i < n; ++i) y[i * to] += x[i * from];
  }
};

// Each pixel's channels less their mean, over their deviation, times a weight, plus a bias.
SNM_INLINE void normalize(const NetOp *op, const NetValue *v, const float *x, float *y) {
  const float *weight = op->memory, *bias = weight + op->wide, *small = bias + op->wide;
  for (int64_t p = 0; p < v->h * v->w; ++p, x += v->c, y += v->c) {
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < v->c; ++c) sum += x[c];
    const double mean = sum / static_cast<double>(v->c);
    for (int64_t c = 0; c < v->c; ++c) squares += (x[c] - mean) * (x[c] - mean);
    const double scale =
        1.0 / __builtin_sqrt(squares / static_cast<double>(v->c) + static_cast<double>(*small));
    for (int64_t c = 0; c < v->c; ++c)
      y[c] = static_cast<float>((x[c] - mean) * scale) * weight[op->wide == kLanesMost ? 0 : c] +
             bias[op->wide == kLanesMost ? 0 : c];
  }
}

}  // namespace
