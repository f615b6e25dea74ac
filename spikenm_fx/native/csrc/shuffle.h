// SPDX-License-Identifier: Apache-2.0
// Arrays of M-tuples to M vectors and back, for powers of two, in registers: one element index bit
// after the other moves from the lane to the number of the vector.
#pragma once
#include "simd.h"

#include <utility>

namespace {

#if defined(__clang__)
#define SNM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SNM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// Every second lane of a and then of b, from lane kOdd on.
template <int kOdd, class V, int... kLane>
SNM_INLINE V every_second(V a, V b, std::integer_sequence<int, kLane...>) {
  return SNM_SHUFFLE(a, b, (2 * kLane + kOdd)...);
}

// Lanes of a and b in turn, from the lower or the upper half.
template <int kHalf, class V, int... kLane>
SNM_INLINE V in_turn(V a, V b, std::integer_sequence<int, kLane...>) {
  return SNM_SHUFFLE(a, b, (kHalf * VW / 2 + kLane / 2 + (kLane % 2) * VW)...);
}

typedef std::make_integer_sequence<int, VW> lane_numbers;

// tuples: VW tuples of kM elements in a row; planes[j * kStep]: element j of all of them.
template <int kM, int kStep = 1, class V>
SNM_INLINE void unzip(const V *tuples, V *planes) {
  if constexpr (kM == 1) {
    planes[0] = tuples[0];
  } else {
    V even[kM / 2], odd[kM / 2];
#pragma GCC unroll 16
    for (int i = 0; i < kM / 2; ++i) {
      even[i] = every_second<0>(tuples[2 * i], tuples[2 * i + 1], lane_numbers());
      odd[i] = every_second<1>(tuples[2 * i], tuples[2 * i + 1], lane_numbers());
    }
    unzip<kM / 2, 2 * kStep>(even, planes);
    unzip<kM / 2, 2 * kStep>(odd, planes + kStep);
  }
}

// The inverse of unzip.
template <int kM, int kStep = 1, class V>
SNM_INLINE void zip(const V *planes, V *tuples) {
  if constexpr (kM == 1) {
    tuples[0] = planes[0];
  } else {
    V even[kM / 2], odd[kM / 2];
    zip<kM / 2, 2 * kStep>(planes, even);
    zip<kM / 2, 2 * kStep>(planes + kStep, odd);
#pragma GCC unroll 16
    for (int i = 0; i < kM / 2; ++i) {
      tuples[2 * i] = in_turn<0>(even[i], odd[i], lane_numbers());
      tuples[2 * i + 1] = in_turn<1>(even[i], odd[i], lane_numbers());
    }
  }
}

}  // namespace
