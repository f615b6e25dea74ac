// SPDX-License-Identifier: Apache-2.0
// Thresholds, activation functions and softmax: number by number, or along one axis of a token.
#pragma once
#include "net.h"
#include "simd.h"

namespace {

// Spikes where a number passes its threshold, 64 numbers a word; NaN passes none.
SNM_INLINE void compare(const NetOp *op, const float *x, uint64_t *y, int64_t size) {
  const bool alike = op->wide == kLanesMost;
  const int64_t mode = op->word[kMode];
  for (int64_t i = 0; i < size; i += 64) {
    uint64_t word = 0;
    for (int64_t j = 0; j < 64 && i + j < size; j += VW) {
      const vf v = loadu(x + i + j), limit = loadu(op->memory + (alike ? 0 : i + j));
      const vi fires = reinterpret_cast<vi>(mode == kGreater        ? v > limit
                                            : mode == kGreaterEqual ? v >= limit
                                            : mode == kLess         ? v < limit
                                                                    : v <= limit);
      word |= static_cast<uint64_t>(lanes(fires)) << j;
    }
    if (size - i < 64) word &= (1ull << (size - i)) - 1;
    y[i / 64] = word;
  }
}

SNM_INLINE float function_of(int64_t mode, float x) {
  constexpr float kRootHalf = 0.70710678118654752f, kRootTwoOverPi = 0.79788456080286536f;
  switch (mode) {
    case kSigmoid: return 1.0f / (1.0f + __builtin_expf(-x));
    case kTanh: return __builtin_tanhf(x);
    case kGelu: return 0.5f * x * (1.0f + __builtin_erff(x * kRootHalf));
    case kGeluTanh:
      return 0.5f * x * (1.0f + __builtin_tanhf(kRootTwoOverPi * (x + 0.044715f * x * x * x)));
    case kSilu: return x / (1.0f + __builtin_expf(-x));
    default: return __builtin_expf(x);
  }
}

SNM_INLINE void pointwise(int64_t mode, const float *x, float *y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = function_of(mode, x[i]);
}

// Along runs of numbers at a distance of each other; the largest is taken off first.
SNM_INLINE void softmax(const int64_t *w, const float *x, float *y, int64_t size) {
  const int64_t n = w[kSoftmaxSize], apart = w[kSoftmaxApart];
  for (int64_t outer = 0; outer < size; outer += n * apart)
    for (int64_t i = outer; i < outer + apart; ++i) {
      float largest = x[i], sum = 0.0f;
      for (int64_t k = 1; k < n; ++k) {
        const float v = x[i + k * apart];
        if (v > largest || v != v) largest = v;
      }
      for (int64_t k = 0; k < n; ++k) {
        const float power = __builtin_expf(x[i + k * apart] - largest);
        y[i + k * apart] = power, sum += power;
      }
      const float log_sum = w[kSoftmaxMode] ? __builtin_logf(sum) : 0.0f;
      for (int64_t k = 0; k < n; ++k)
        y[i + k * apart] = w[kSoftmaxMode] ? x[i + k * apart] - largest - log_sum
                                           : y[i + k * apart] / sum;
    }
}

}  // namespace
