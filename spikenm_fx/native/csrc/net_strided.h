// SPDX-License-Identifier: Apache-2.0
// Products, sums and copies along any axes of a token: nested loops over numbers at fixed distances.
#pragma once
#include "net.h"
#include "simd.h"

namespace {

struct Strided {
  int64_t mode, loops, size[kStridedLoops], to[kStridedLoops], a[kStridedLoops], b[kStridedLoops];

  bool finite[2];  // of the operands: zero times any of its numbers is zero

  Strided(const int64_t *w, bool a_finite, bool b_finite)
      : mode(w[kMode]), loops(w[kStridedCount]), finite{a_finite, b_finite} {
    for (int64_t i = 0; i < loops; ++i) {
      const int64_t *loop = w + kStridedLoop + 4 * i;
      size[i] = loop[0], to[i] = loop[1], a[i] = loop[2], b[i] = loop[3];
    }
  }

  // Adds to y, which starts as zeros.
  void run(const float *x, const float *z, float *y) const {
    if (loops == 1) return inner(x, z, y);
    if (const int which = matrix_among()) return matrices(which == 2, x, z, y);
    outer(0, x, z, y);
  }

  // Spikes that lie side by side in the innermost loop, set where zeros were.
  bool copies_runs() const {
    const int64_t k = loops - 1;
    return mode == kCopy && to[k] == 1 && a[k] == 1;
  }
  void copy_bits(int64_t at, const uint64_t *x, int64_t from, float *y) const {
    if (at + 1 == loops) return spread_bits(x, from, y, size[at]);
    for (int64_t i = 0; i < size[at]; ++i) copy_bits(at + 1, x, from + i * a[at], y + i * to[at]);
  }

 private:
  static void spread_bits(const uint64_t *x, int64_t from, float *y, int64_t n) {
    for (int64_t i = 0; i < n;) {
      const int64_t shift = (from + i) % 64, there = least(64 - shift, n - i);
      const uint64_t word = x[(from + i) / 64] >> shift;
      int64_t j = 0;
      for (; j + VW <= there; j += VW)
        storeu(y + i + j, loadu(y + i + j) + ones_of(static_cast<uint32_t>(word >> j)));
      for (; j < there; ++j) y[i + j] += static_cast<float>(word >> j & 1);
      i += there;
    }
  }

  // Products of rows that lie side by side with one vector: 1 if the rows are those of the first
  // operand, 2 of the second, 0 where there are none, or not with many vectors.
  int matrix_among() const {
    const int64_t k = loops - 1, row = k - 1;
    if (mode != kMul || to[k] != 0 || a[k] != 1 || b[k] != 1 || to[row] != 1 || size[row] < VW ||
        size[k] * size[row] > kMostMatrix)
      return 0;
    const int found = b[row] == 0 && a[row] > 0 ? 1 : a[row] == 0 && b[row] > 0 ? 2 : 0;
    int64_t vectors = 1;
    for (int64_t i = 0; i < row; ++i)
      if (found && (found == 1 ? a : b)[i] == 0) vectors *= size[i];
    return vectors >= 4 ? found : 0;
  }

  static constexpr int64_t kMostMatrix = 1 << 14;

  // Loops along which the matrix stays are turned last, so that it is laid out column by column
  // once for all vectors; a column of which the vector has nothing is left out.
  void matrices(bool second, const float *x, const float *z, float *y) const {
    const int64_t outer_loops = loops - 2;
    const int64_t *own = second ? b : a, *other = second ? a : b;
    Matrix m = {own, other, {}, outer_loops, nullptr, nullptr,
                finite[second ? 1 : 0]};
    int64_t n = 0;
    for (int64_t i = 0; i < outer_loops; ++i)
      if (own[i] != 0) m.order[n++] = i;
    for (int64_t i = 0; i < outer_loops; ++i)
      if (own[i] == 0) m.order[n++] = i;
    m.columns = static_cast<float *>(
        snm_scratch(2, sizeof(float) * static_cast<size_t>(size[loops - 1] * size[loops - 2])));
    second ? turn(&m, 0, z, x, y) : turn(&m, 0, x, z, y);
  }

  struct Matrix {
    const int64_t *own, *other;
    int64_t order[kStridedLoops], loops;
    const float *laid_out;
    float *columns;
    bool finite;
  };

  void turn(Matrix *m, int64_t at, const float *rows, const float *vector, float *y) const {
    if (at == m->loops) return product_with(m, rows, vector, y);
    const int64_t k = m->order[at];
    for (int64_t i = 0; i < size[k]; ++i)
      turn(m, at + 1, rows + i * m->own[k], vector + i * m->other[k], y + i * to[k]);
  }

  void product_with(Matrix *m, const float *rows, const float *vector, float *y) const {
    const int64_t inner = size[loops - 1], outs = size[loops - 2], apart = m->own[loops - 2];
    if (m->laid_out != rows)
      for (int64_t i = 0; i < outs; ++i)
        for (int64_t j = 0; j < inner; ++j) m->columns[j * outs + i] = rows[i * apart + j];
    m->laid_out = rows;
    sum_of_rows(vector, 1, inner, m->columns, outs, y, outs, m->finite);
  }

  void outer(int64_t at, const float *x, const float *z, float *y) const {
    if (at + 2 == loops && mode == kMul && to[at] == 0 && to[at + 1] == 1) {
      const int64_t turns = size[at], n = size[at + 1];
      if (a[at + 1] == 0 && b[at + 1] == 1)
        return sum_of_rows(x, a[at], turns, z, b[at], y, n, finite[1]);
      if (a[at + 1] == 1 && b[at + 1] == 0)
        return sum_of_rows(z, b[at], turns, x, a[at], y, n, finite[0]);
    }
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

  // The sum of rows that lie side by side, each times its factor; those without one are left out.
  static void sum_of_rows(const float *factor, int64_t next, int64_t turns, const float *row,
                          int64_t next_row, float *y, int64_t n, bool left_out) {
    // Found first, without a branch: which factors are zero no processor foresees.
    int32_t *there = static_cast<int32_t *>(
        snm_scratch(3, sizeof(int32_t) * static_cast<size_t>(turns + 1)));
    int64_t count = 0;
    for (int64_t i = 0; i < turns; ++i) {
      there[count] = static_cast<int32_t>(i);
      count += (factor[i * next] != 0.0f) | !left_out;
    }
    constexpr int64_t kWide = 4 * VW;
    int64_t o = 0;
    for (; o + kWide <= n; o += kWide) {
      vf sum[4];
      for (int j = 0; j < 4; ++j) sum[j] = loadu(y + o + j * VW);
      for (int64_t k = 0; k < count; ++k) {
        const vf of = splat(factor[there[k] * next]);
        const float *from = row + there[k] * next_row + o;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = madd(of, loadu(from + j * VW), sum[j]);
      }
      for (int j = 0; j < 4; ++j) storeu(y + o + j * VW, sum[j]);
    }
    for (int64_t k = 0; k < count && o < n; ++k)
      multiples(factor[there[k] * next], row + there[k] * next_row + o, y + o, n - o);
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
