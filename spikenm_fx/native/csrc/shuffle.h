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

// Tuples of a multiple of four elements, four at a time: pieces of 16 bytes go to the lanes of 16
// bytes in which they end, and are turned inside of them, which needs a third of the instructions.
constexpr int kLanes16 = VW / 4;

// kLanes16 pieces, `step` floats from one to the next.
SNM_INLINE vf load_pieces(const float *p, int64_t step) {
#if defined(__AVX512BW__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
  return reinterpret_cast<vf>(_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3));
#elif defined(__AVX2__)
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(p));
  return reinterpret_cast<vf>(_mm256_insertf128_ps(v, _mm_loadu_ps(p + step), 1));
#else
  return loadu(p);
#endif
}

SNM_INLINE void store_pieces(float *p, int64_t step, vf v) {
#if defined(__AVX512BW__)
  const __m512 x = reinterpret_cast<__m512>(v);
  _mm_storeu_ps(p, _mm512_castps512_ps128(x));
  _mm_storeu_ps(p + step, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(p + 2 * step, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(p + 3 * step, _mm512_extractf32x4_ps(x, 3));
#elif defined(__AVX2__)
  const __m256 x = reinterpret_cast<__m256>(v);
  _mm_storeu_ps(p, _mm256_castps256_ps128(x));
  _mm_storeu_ps(p + step, _mm256_extractf128_ps(x, 1));
#else
  storeu(p, v);
#endif
}

// Of every lane of 16 bytes the kPair-th half of a and of b, kOf words at a time in turn.
template <int kPair, int kOf, int... kLane>
SNM_INLINE vf halves(vf a, vf b, std::integer_sequence<int, kLane...>) {
  return SNM_SHUFFLE(
      a, b,
      (kLane / 4 * 4 + kPair * 2 +
       (kOf == 1 ? kLane % 4 / 2 + (kLane % 2) * VW : kLane % 2 + (kLane % 4 / 2) * VW))...);
}

// The 4 x 4 elements in each lane of 16 bytes of four vectors change rows and columns.
SNM_INLINE void turn(vf *v) {
  const lane_numbers n;
  const vf a = halves<0, 1>(v[0], v[1], n), b = halves<1, 1>(v[0], v[1], n);
  const vf c = halves<0, 1>(v[2], v[3], n), d = halves<1, 1>(v[2], v[3], n);
  v[0] = halves<0, 2>(a, c, n);
  v[1] = halves<1, 2>(a, c, n);
  v[2] = halves<0, 2>(b, d, n);
  v[3] = halves<1, 2>(b, d, n);
}

// planes[j]: element j of VW tuples of kM elements at p.
template <int kM>
SNM_INLINE void load_tuples(const float *p, vf *planes) {
  if constexpr (kM % 4) {
    vf tuples[kM];
#pragma GCC unroll 16
    for (int j = 0; j < kM; ++j) tuples[j] = loadu(p + j * VW);
    unzip<kM>(tuples, planes);
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < kM; j += 4) {
#pragma GCC unroll 16
      for (int k = 0; k < 4; ++k) planes[j + k] = load_pieces(p + j + k * kM, 4 * kM);
      turn(planes + j);
    }
  }
}

// The inverse.
template <int kM>
SNM_INLINE void store_tuples(const vf *planes, float *p) {
  if constexpr (kM % 4) {
    vf tuples[kM];
    zip<kM>(planes, tuples);
#pragma GCC unroll 16
    for (int j = 0; j < kM; ++j) storeu(p + j * VW, tuples[j]);
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < kM; j += 4) {
      vf four[4] = {planes[j], planes[j + 1], planes[j + 2], planes[j + 3]};
      turn(four);
#pragma GCC unroll 16
      for (int k = 0; k < 4; ++k) store_pieces(p + j + k * kM, 4 * kM, four[k]);
    }
  }
}

}  // namespace
