// SPDX-License-Identifier: Apache-2.0
// Vectors of stored weights as floats, and of packed positions as what they pick from a table.
#pragma once
#include "half.h"
#include "simd.h"

namespace {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

SNM_INLINE vf weights_at(const float *p) { return loadu(p); }

SNM_INLINE vf weights_at(const int8_t *p) {
#if defined(__AVX512BW__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return reinterpret_cast<vf>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
  return reinterpret_cast<vf>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)));
#elif defined(__ARM_NEON)
  uint32_t word;
  memcpy(&word, p, 4);
  const int8x8_t raw = vreinterpret_s8_u32(vdup_n_u32(word));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(raw))));
#else
  return vf{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
            static_cast<float>(p[3])};
#endif
}

SNM_INLINE vf weights_at(const Half *p) {
#if defined(__AVX512BW__)
  return reinterpret_cast<vf>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<vf>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#elif defined(__ARM_NEON)
  uint16x4_t raw;
  memcpy(&raw, p, 8);
  return vcvt_f32_f16(vreinterpret_f16_u16(raw));
#else
  vf x;
  for (int i = 0; i < VW; ++i) x[i] = from_half(p[i].bits);
  return x;
#endif
}

SNM_INLINE vf weights_at(const Brain *p) {
#if defined(__AVX512BW__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return reinterpret_cast<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#elif defined(__ARM_NEON)
  uint16x4_t raw;
  memcpy(&raw, p, 8);
  return vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
#else
  vf x;
  for (int i = 0; i < VW; ++i) x[i] = from_brain(p[i].bits);
  return x;
#endif
}

// Positions of the outputs [o, o + VW) of a packed row, in the low kBits of each lane; what lies
// above them is anything.
template <int kBits>
SNM_INLINE vw positions_at(const uint8_t *row, int64_t o) {
  const uint8_t *at = row + o / 8 * kBits;
  uint64_t eight;
  memcpy(&eight, at, 8);
#if defined(__AVX512BW__)
  if constexpr (kBits <= 2) {
    const vw shifts = (vw{} + kBits) * vw{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (static_cast<uint32_t>(eight) - vw{}) >> shifts;
  }
  const vw shifts = (vw{} + kBits) * vw{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  uint64_t more;
  memcpy(&more, at + kBits, 8);
  const uint32_t a = static_cast<uint32_t>(eight), b = static_cast<uint32_t>(eight >> 4 * kBits);
  const uint32_t c = static_cast<uint32_t>(more), d = static_cast<uint32_t>(more >> 4 * kBits);
  const vw words = {a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d};
  return words >> shifts;
#elif defined(__AVX2__)
  if constexpr (kBits <= 4) {
    const vw shifts = {0, kBits, 2 * kBits, 3 * kBits, 4 * kBits, 5 * kBits, 6 * kBits, 7 * kBits};
    return (static_cast<uint32_t>(eight) - vw{}) >> shifts;
  } else {
    const uint32_t a = static_cast<uint32_t>(eight), b = static_cast<uint32_t>(eight >> 4 * kBits);
    const vw words = {a, a, a, a, b, b, b, b};
    const vw shifts = {0, kBits, 2 * kBits, 3 * kBits, 0, kBits, 2 * kBits, 3 * kBits};
    return words >> shifts;
  }
#else
  const vw shifts = {0, kBits, 2 * kBits, 3 * kBits};
  return (static_cast<uint32_t>(eight >> (o % 8 * kBits)) - vw{}) >> shifts;
#endif
}

// A table of what each position of a block picks, ready to be looked up.  It is stored repeated
// to kTable floats, so that bits above a position do no harm where a permute ignores them.
constexpr int kTable = 16;

#if defined(__AVX512BW__)
constexpr int kQuickBits = 4;
struct Picks {
  __m512 table;
  explicit Picks(const float *t) : table(_mm512_loadu_ps(t)) {}
};
template <int kBits>
SNM_INLINE vf picked(const Picks &p, const float *, vw at) {
  return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(at), p.table));
}
#elif defined(__AVX2__)
constexpr int kQuickBits = 4;
struct Picks {
  __m256 low, high;
  explicit Picks(const float *t) : low(_mm256_loadu_ps(t)), high(_mm256_loadu_ps(t + 8)) {}
};
template <int kBits>
SNM_INLINE vf picked(const Picks &p, const float *, vw at) {
  const __m256i index = reinterpret_cast<__m256i>(at);
  if constexpr (kBits <= 2) return reinterpret_cast<vf>(_mm256_permutevar_ps(p.low, index));
  const __m256 low = _mm256_permutevar8x32_ps(p.low, index);
  if constexpr (kBits <= 3) return reinterpret_cast<vf>(low);
  const __m256 high = _mm256_permutevar8x32_ps(p.high, index);
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return reinterpret_cast<vf>(_mm256_blendv_ps(low, high, upper));
}
#elif defined(__ARM_NEON)
constexpr int kQuickBits = 4;
struct Picks {
  uint8x16x4_t table;
  explicit Picks(const float *t) {
    for (int i = 0; i < 4; ++i)
      table.val[i] = vreinterpretq_u8_f32(vld1q_f32(t + 4 * i));
  }
};
template <int kBits>
SNM_INLINE vf picked(const Picks &p, const float *, vw at) {
  const uint32x4_t masked = vandq_u32(at, vdupq_n_u32((1u << kBits) - 1));
  const uint8x16_t bytes = vreinterpretq_u8_u32(
      vmlaq_u32(vdupq_n_u32(0x03020100), masked, vdupq_n_u32(0x04040404)));
  if constexpr (kBits <= 2) return vreinterpretq_f32_u8(vqtbl1q_u8(p.table.val[0], bytes));
  const uint8x16x2_t two = {{p.table.val[0], p.table.val[1]}};
  if constexpr (kBits <= 3) return vreinterpretq_f32_u8(vqtbl2q_u8(two, bytes));
  return vreinterpretq_f32_u8(vqtbl4q_u8(p.table, bytes));
}
#else
constexpr int kQuickBits = 0;
struct Picks {
  explicit Picks(const float *) {}
};
template <int kBits>
SNM_INLINE vf picked(const Picks &, const float *, vw) {
  return vf{};
}
#endif

// x[i] = table[at[i]].
template <int kBits>
SNM_INLINE vf looked_up(const Picks &p, const float *table, vw at) {
  if constexpr (kBits == 0) return splat(table[0]);
  if constexpr (kBits <= kQuickBits) return picked<kBits>(p, table, at);
  vf x;
  for (int i = 0; i < VW; ++i) x[i] = table[at[i] & ((1u << kBits) - 1)];
  return x;
}

}  // namespace
