// SPDX-License-Identifier: Apache-2.0
// The little that differs between ISA levels.  Everything has internal linkage: the same source is
// compiled once per level, and no function of a higher level may ever be merged into a lower one.
#pragma once
#include "abi.h"

#include <cstring>
#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define SNM_INLINE static inline __attribute__((always_inline, unused))

namespace {

#if defined(__AVX512BW__)
constexpr int VW = 16;  // floats per vector
#elif defined(__AVX2__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif

typedef float vf __attribute__((vector_size(VW * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(VW * 4), may_alias));
typedef uint32_t vw __attribute__((vector_size(VW * 4), may_alias));
typedef int16_t vs __attribute__((vector_size(VW * 4), may_alias));
typedef uint64_t vu __attribute__((vector_size(VW * 4), may_alias));
typedef float vf_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));

SNM_INLINE vf load(const float *p) { return *reinterpret_cast<const vf *>(p); }
SNM_INLINE vf loadu(const float *p) { return *reinterpret_cast<const vf_any *>(p); }
SNM_INLINE void store(float *p, vf v) { *reinterpret_cast<vf *>(p) = v; }
SNM_INLINE void storeu(float *p, vf v) { *reinterpret_cast<vf_any *>(p) = v; }
SNM_INLINE vf splat(float x) { return x - vf{}; }
SNM_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SNM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
SNM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One bit per lane of a comparison result.
SNM_INLINE uint32_t lanes(vi mask) {
#if defined(__AVX512BW__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#elif defined(__ARM_NEON)
  const uint32x4_t weights = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(reinterpret_cast<uint32x4_t>(mask), weights));
#else
  uint32_t bits = 0;
  for (int i = 0; i < VW; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
#endif
}

SNM_INLINE vf select(vi mask, vf yes, vf no) {
  return reinterpret_cast<vf>((reinterpret_cast<vi>(yes) & mask) |
                              (reinterpret_cast<vi>(no) & ~mask));
}

// a * b + c; written out because contraction is off, so that levels differ only where meant.
SNM_INLINE vf madd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a),
                                              reinterpret_cast<__m512>(b),
                                              reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<vf>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a),
                                              reinterpret_cast<__m256>(b),
                                              reinterpret_cast<__m256>(c)));
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// dst[j][i] = row(i)[j] for i, j < VW; the stride is in floats.
template <class Row>
SNM_INLINE void transpose_rows(Row row, float *dst, int64_t dst_stride) {
#if defined(__AVX512BW__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(row(i));
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 2; ++k) {
      const __m512d a = _mm512_castps_pd(t[4 * i + k]), b = _mm512_castps_pd(t[4 * i + 2 + k]);
      r[4 * i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88);
    t[4 + k] = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xdd);
    t[8 + k] = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88);
    t[12 + k] = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xdd);
  }
  for (int k = 0; k < 4; ++k) {
    _mm512_storeu_ps(dst + k * dst_stride, _mm512_shuffle_f32x4(t[k], t[8 + k], 0x88));
    _mm512_storeu_ps(dst + (8 + k) * dst_stride, _mm512_shuffle_f32x4(t[k], t[8 + k], 0xdd));
    _mm512_storeu_ps(dst + (4 + k) * dst_stride, _mm512_shuffle_f32x4(t[4 + k], t[12 + k], 0x88));
    _mm512_storeu_ps(dst + (12 + k) * dst_stride, _mm512_shuffle_f32x4(t[4 + k], t[12 + k], 0xdd));
  }
#elif defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(row(i));
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 2; ++k) {
      const __m256d a = _mm256_castps_pd(t[4 * i + k]), b = _mm256_castps_pd(t[4 * i + 2 + k]);
      r[4 * i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[4 * i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(dst + k * dst_stride, _mm256_permute2f128_ps(r[k], r[4 + k], 0x20));
    _mm256_storeu_ps(dst + (4 + k) * dst_stride, _mm256_permute2f128_ps(r[k], r[4 + k], 0x31));
  }
#elif defined(__ARM_NEON)
  const float32x4x2_t a = vtrnq_f32(vld1q_f32(row(0)), vld1q_f32(row(1)));
  const float32x4x2_t b = vtrnq_f32(vld1q_f32(row(2)), vld1q_f32(row(3)));
  for (int k = 0; k < 2; ++k) {
    vst1q_f32(dst + k * dst_stride, vcombine_f32(vget_low_f32(a.val[k]), vget_low_f32(b.val[k])));
    vst1q_f32(dst + (2 + k) * dst_stride,
              vcombine_f32(vget_high_f32(a.val[k]), vget_high_f32(b.val[k])));
  }
#else
  for (int i = 0; i < VW; ++i)
    for (int j = 0; j < VW; ++j) dst[j * dst_stride + i] = row(i)[j];
#endif
}

SNM_INLINE void transpose(const float *src, int64_t src_stride, float *dst, int64_t dst_stride) {
  transpose_rows([=](int64_t i) { return src + i * src_stride; }, dst, dst_stride);
}

// Transpose of a 64x64 bit matrix in place: bit j of word i moves to bit i of word j.
SNM_INLINE void transpose_bits(uint64_t *a) {
  uint64_t mask = 0x00000000ffffffffull;
  for (int j = 32; j != 0; j >>= 1, mask ^= mask << j)
    for (int base = 0; base < 64; base += 2 * j)
      for (int k = base; k < base + j; ++k) {
        const uint64_t swap = ((a[k] >> j) ^ a[k + j]) & mask;
        a[k] ^= swap << j;
        a[k + j] ^= swap;
      }
}

}  // namespace
