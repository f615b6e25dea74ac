// SPDX-License-Identifier: Apache-2.0
// Table look-up for binary inputs, exact in fp32.
//
// Four non-zeros of a row have 16 possible sums under binary inputs.  They are the outer sum of two
// tables of four, {0, w0, w1, w0+w1} and {0, w2, w3, w2+w3}, which are stored; with AVX-512 the
// whole table is one register and one permute looks up 16 tokens.  A permute reads the low 4 bits
// of each 32-bit lane only, so that the indices of 64 tokens fit 64 bytes: byte b of a lane belongs
// to token 16 b + lane and is reached by a shift.  Indices depend on the positions of the
// non-zeros, not on their values: they are computed once per 64 tokens for every possible pattern
// and shared by all output channels.
#pragma once
#include "epilogue.h"

namespace {

constexpr int SPAN = 4 * VW < 64 ? 4 * VW : 64;  // tokens whose indices share one vector

// Where a token's byte lies inside a tile.
SNM_INLINE int64_t place(int64_t token) {
  return token / SPAN * SPAN + 4 * (token % VW) + token % SPAN / VW;
}

// A scheme: how a half table (two non-zeros) spreads over input channels.
//   Pairs:  both non-zeros in one block of `half` channels (2:M).
//   !Pairs: one non-zero in each of two blocks of half/2 channels (1:M).
//   Joint:  planes for all pairs of halves (no OR in the inner loop); else planes per half.
//   Block:  input channels whose planes are live at once; they must fit L1 beside the tables.
template <int kHalf, bool kPairs, bool kJoint, int kBlock>
struct Scheme {
  static constexpr int half = kHalf, inputs = 2 * kHalf, block = kBlock;
  static constexpr bool joint = kJoint;
  static constexpr int patterns = kPairs ? kHalf * (kHalf - 1) / 2 : (kHalf / 2) * (kHalf / 2);
  static constexpr int planes = kJoint ? patterns * patterns : 2 * patterns;
  static constexpr int codes = kJoint ? 1 : 2;  // plane numbers stored per (row, unit)
  static constexpr bool pairs = kPairs;
};

// Index planes of one unit for 64 tokens; bytes[j]: 8 input channels of each token, placed.
template <class S>
SNM_INLINE void build_planes(const uint8_t *bytes, uint8_t *planes) {
  constexpr int N = TILE / (VW * 4);  // vectors per plane
  const vu one = vu{} + 0x0101010101010101ull;
  for (int v = 0; v < N; ++v) {
    vu low[S::patterns], high[S::patterns];
    for (int h = 0; h < 2; ++h) {
      vu bit[S::half];
      for (int i = 0; i < S::half; ++i) {
        const int channel = h * S::half + i;
        vu raw;
        memcpy(&raw, bytes + channel / 8 * TILE + v * VW * 4, sizeof raw);
        bit[i] = (raw >> (channel % 8)) & one;
      }
      vu *plane = h ? high : low;
      int p = 0;
      if constexpr (S::pairs) {
        for (int i = 0; i < S::half; ++i)
          for (int j = i + 1; j < S::half; ++j) plane[p++] = (bit[i] | bit[j] << 1) << (2 * h);
      } else {
        for (int i = 0; i < S::half / 2; ++i)
          for (int j = S::half / 2; j < S::half; ++j)
            plane[p++] = (bit[i] | bit[j] << 1) << (2 * h);
      }
    }
    uint8_t *out = planes + v * VW * 4;
    if constexpr (S::joint) {
      for (int i = 0; i < S::patterns; ++i)
        for (int j = 0; j < S::patterns; ++j) {
          const vu joint = low[i] | high[j];
          memcpy(out + (i * S::patterns + j) * TILE, &joint, sizeof joint);
        }
    } else {
      for (int i = 0; i < S::patterns; ++i) {
        memcpy(out + i * TILE, &low[i], sizeof low[i]);
        memcpy(out + (S::patterns + i) * TILE, &high[i], sizeof high[i]);
      }
    }
  }
}

// Floats of a table as the row loop reads it.  Halves are what is stored; where several tiles use
// a table, whole ones are made once per item, which takes a permute and an add out of the loop.
constexpr int HALVES = 8, WHOLE = 16;

#if defined(__AVX512BW__)
SNM_INLINE __m512 whole_table(const float *halves) {
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512 low = _mm512_broadcast_f32x4(_mm_load_ps(halves));
  const __m512 high = _mm512_broadcast_f32x4(_mm_load_ps(halves + 4));
  return _mm512_add_ps(low, _mm512_permutexvar_ps(spread, high));
}

SNM_INLINE void widen(const float *halves, float *whole) {
  _mm512_store_ps(whole, whole_table(halves));
}
#else
SNM_INLINE void widen(const float *halves, float *whole) {
  for (int i = 0; i < 16; ++i) whole[i] = halves[i & 3] + halves[4 + (i >> 2)];
}
#endif

template <class S>
SNM_INLINE const uint8_t *plane_of(const uint8_t *planes, int unit, uint16_t code) {
  return planes + (static_cast<size_t>(unit) * S::planes) * TILE + code;
}

// One row of one K-block added to the sums of 64 tokens.
template <class S, int kTable>
SNM_INLINE void lut_row(const uint8_t *planes, const float *tables, const uint16_t *codes,
                        int units, float *y, bool first) {
#if defined(__AVX512BW__)
  __m512 a[4];
  for (int b = 0; b < 4; ++b) a[b] = first ? _mm512_setzero_ps() : _mm512_load_ps(y + 16 * b);
#pragma GCC unroll 8
  for (int u = 0; u < units; ++u) {
    const __m512 table = kTable == WHOLE ? _mm512_load_ps(tables + u * WHOLE)
                                         : whole_table(tables + u * HALVES);
    const uint8_t *plane = plane_of<S>(planes, u, codes[u * S::codes]);
    __m512i index = _mm512_load_si512(plane);
    if constexpr (!S::joint)
      index = _mm512_or_si512(
          index, _mm512_load_si512(plane_of<S>(planes, u, codes[u * S::codes + 1])));
    a[0] = _mm512_add_ps(a[0], _mm512_permutexvar_ps(index, table));
    a[1] = _mm512_add_ps(a[1], _mm512_permutexvar_ps(_mm512_srli_epi32(index, 8), table));
    a[2] = _mm512_add_ps(a[2], _mm512_permutexvar_ps(_mm512_srli_epi32(index, 16), table));
    a[3] = _mm512_add_ps(a[3], _mm512_permutexvar_ps(_mm512_srli_epi32(index, 24), table));
  }
  for (int b = 0; b < 4; ++b) _mm512_store_ps(y + 16 * b, a[b]);
#elif defined(__AVX2__)
  // Permutes look up 4 entries: both halves are looked up on their own.
  const auto half = [](const float *p) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(p));
  };
  const auto vector = [](const uint8_t *p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i *>(p));
  };
  for (int h = 0; h < TILE; h += 32) {
    __m256 a[4];
    for (int b = 0; b < 4; ++b)
      a[b] = first ? _mm256_setzero_ps() : _mm256_load_ps(y + h + b * 8);
#pragma GCC unroll 8
    for (int u = 0; u < units; ++u) {
      const __m256 low = half(tables + u * HALVES), high = half(tables + u * HALVES + 4);
      __m256i index = vector(plane_of<S>(planes, u, codes[u * S::codes]) + h);
      if constexpr (!S::joint)
        index = _mm256_or_si256(
            index, vector(plane_of<S>(planes, u, codes[u * S::codes + 1]) + h));
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        const __m256i at = _mm256_srli_epi32(index, 8 * b);
        const __m256 sum = _mm256_add_ps(
            _mm256_permutevar_ps(low, at),
            _mm256_permutevar_ps(high, _mm256_srli_epi32(at, 2)));
        a[b] = _mm256_add_ps(a[b], sum);
      }
    }
    for (int b = 0; b < 4; ++b) _mm256_store_ps(y + h + b * 8, a[b]);
  }
#elif defined(__ARM_NEON)
  // A table of 16 floats is 64 bytes, which one look-up of bytes reaches.
  const uint32x4_t low_byte = vdupq_n_u32(0xff), four = vdupq_n_u32(0x04040404);
  const uint32x4_t bytes = vdupq_n_u32(0x03020100);
  if (first) memset(y, 0, sizeof(float) * TILE);
  for (int u = 0; u < units; ++u) {
    const float *halves = tables + u * HALVES;
    const float32x4_t base = vld1q_f32(halves);
    uint8x16x4_t table;
    for (int k = 0; k < 4; ++k)
      table.val[k] = vreinterpretq_u8_f32(vaddq_f32(base, vdupq_n_f32(halves[4 + k])));
    const uint8_t *low = plane_of<S>(planes, u, codes[u * S::codes]);
    const uint8_t *high = plane_of<S>(planes, u, codes[u * S::codes + S::codes - 1]);
    for (int h = 0; h < TILE; h += 16) {
      const uint8x16_t both = vorrq_u8(vld1q_u8(low + h), vld1q_u8(high + h));
      uint32x4_t index = vreinterpretq_u32_u8(vandq_u8(both, vdupq_n_u8(15)));
      for (int b = 0; b < 4; ++b, index = vshrq_n_u32(index, 8)) {
        const uint32x4_t at = vmlaq_u32(bytes, vandq_u32(index, low_byte), four);
        float *to = y + h + 4 * b;
        vst1q_f32(to, vaddq_f32(vld1q_f32(to), vreinterpretq_f32_u8(vqtbl4q_u8(
                                                   table, vreinterpretq_u8_u32(at)))));
      }
    }
  }
#else
  if (first) memset(y, 0, sizeof(float) * TILE);
  for (int u = 0; u < units; ++u) {
    float sums[16];
    widen(tables + u * HALVES, sums);
    const uint8_t *low = plane_of<S>(planes, u, codes[u * S::codes]);
    const uint8_t *high = plane_of<S>(planes, u, codes[u * S::codes + S::codes - 1]);
    for (int token = 0; token < TILE; ++token) {
      const int64_t at = place(token);
      y[token] += sums[(low[at] | high[at]) & 15];
    }
  }
#endif
}

// Rows [0, outputs) of one K-block on one tile.  tables: [row][unit][kTable]; codes:
// [row][unit][codes], byte offsets of planes inside a unit; y: [row][TILE].
template <class S, int kTable, int kUnits>
void lut_rows(const uint8_t *planes, const float *tables, const uint16_t *codes, int units,
              int64_t outputs, float *y, bool first) {
  if (kUnits) units = kUnits;
  for (int64_t o = 0; o < outputs; ++o) {
    lut_row<S, kTable>(planes, tables, codes, units, y, first);
    tables += units * kTable;
    codes += units * S::codes;
    y += TILE;
  }
}

// bytes[j][place(token)] = byte j of the token's row, from 64 rows.
SNM_INLINE void gather_bytes(const uint8_t *const *rows, int64_t offset, int64_t count,
                             uint8_t *bytes) {
  alignas(64) uint64_t words[TILE];
  for (int64_t j = 0; j < count; j += 8) {
    for (int64_t i = 0; i < TILE; ++i) memcpy(&words[place(i)], rows[i] + offset + j, 8);
    for (int64_t k = 0; k < least(8, count - j); ++k)
      for (int64_t i = 0; i < TILE; ++i)
        bytes[(j + k) * TILE + i] = static_cast<uint8_t>(words[i] >> (8 * k));
  }
}

template <class S>
struct Lut {
  static constexpr int kMaxUnits = S::block / S::inputs;
  const snm_call *call;
  Tokens tokens;
  Split s;
  int64_t row_bytes, group_bytes, group_units;

  explicit Lut(const snm_call *c) : call(c), tokens(c->geometry) {
    const snm_geometry *g = c->geometry;
    s = split(g, c->threads, TILE, 256, 512, 64);
    group_bytes = ceil_div(g->cg, 64) * 8;
    row_bytes = g->groups * group_bytes;
    group_units = 0;
    for (int64_t b = 0; b < c->n_blocks; ++b) group_units += ceil_div(c->blocks[5 * b + 2], S::inputs);
  }

  static void item(void *self, int64_t index) { static_cast<const Lut *>(self)->run(index); }

  int32_t start() {
    if (!blocks_fit(call, S::block, S::inputs, 1)) return -1;
    snm_parallel(s.items(call->geometry), call->threads, item, this);
    return 0;
  }

  void run(int64_t index) const {
    const snm_geometry *g = call->geometry;
    const auto [group, o0, p0, outputs] = s.piece(g, index);
    const int64_t tiles = g->steps * s.pixels / TILE;
    const int64_t padded = ceil_div(outputs, 16) * 16;  // the epilogue reads whole vectors
    float *y = static_cast<float *>(snm_scratch(0, sizeof(float) * tiles * padded * TILE));
    uint8_t *planes = static_cast<uint8_t *>(
        snm_scratch(1, static_cast<size_t>(tiles) * kMaxUnits * S::planes * TILE + TILE));
    float *whole =
        static_cast<float *>(snm_scratch(2, sizeof(float) * outputs * kMaxUnits * WHOLE));
    const uint8_t *nothing = zero_row(row_bytes);
    for (int64_t b = 0; b < call->n_blocks; ++b) {
      const int64_t *block = call->blocks + 5 * b;
      const int64_t units = ceil_div(block[2], S::inputs);
      for (int64_t tile = 0; tile < tiles; ++tile)
        build_tile(group, p0, tile, block, units, nothing,
                   planes + tile * kMaxUnits * S::planes * TILE);
      // Tables and codes: [group][block][output][unit]
      const int64_t row = group * group_units * g->og + block[3] * g->og + o0 * units;
      const float *tables = call->weights + row * 8;
      const uint16_t *codes = static_cast<const uint16_t *>(call->codes) + row * S::codes;
      if (VW == 16 && tiles > 1) {
        for (int64_t i = 0; i < outputs * units; ++i)
          widen(tables + i * HALVES, whole + i * WHOLE);
        rows<WHOLE>(planes, whole, codes, units, outputs, tiles, padded, y, b == 0);
      } else {
        rows<HALVES>(planes, tables, codes, units, outputs, tiles, padded, y, b == 0);
      }
    }
    Epilogue<true>(call).finish({y, padded, o0, outputs, p0, s.pixels}, group * g->og + o0);
  }

  template <int kTable>
  void rows(const uint8_t *planes, const float *tables, const uint16_t *codes, int64_t units,
            int64_t outputs, int64_t tiles, int64_t padded, float *y, bool first) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const uint8_t *plane = planes + tile * kMaxUnits * S::planes * TILE;
      float *sums = y + tile * padded * TILE;
      if (units == kMaxUnits)
        lut_rows<S, kTable, kMaxUnits>(plane, tables, codes, kMaxUnits, outputs, sums, first);
      else
        lut_rows<S, kTable, 0>(plane, tables, codes, static_cast<int>(units), outputs, sums,
                               first);
    }
  }

  void build_tile(int64_t group, int64_t p0, int64_t tile, const int64_t *block, int64_t units,
                  const uint8_t *nothing, uint8_t *planes) const {
    const int64_t per_step = s.pixels / TILE;
    const uint8_t *rows[TILE];
    alignas(64) uint8_t bytes[S::block / 8 * TILE];
    tokens.rows(static_cast<const uint8_t *>(call->input), row_bytes, nothing, tile / per_step,
                block[0], p0 + tile % per_step * TILE, TILE, rows);
    const int64_t first = group * group_bytes + block[1] / 8;
    gather_bytes(rows, first, ceil_div(block[2], 64) * 8, bytes);
    for (int64_t u = 0; u < units; ++u)
      build_planes<S>(bytes + u * (S::inputs / 8) * TILE, planes + u * S::planes * TILE);
  }
};

typedef Scheme<4, true, true, 64> TwoOfFour;
typedef Scheme<8, false, false, 128> OneOfFour;
typedef Scheme<8, true, false, 128> TwoOfEight;
typedef Scheme<16, false, false, 128> OneOfEight;

int32_t lut(const snm_call *call) {
  switch (call->kind) {
    case 0: return Lut<TwoOfFour>(call).start();
    case 1: return Lut<OneOfFour>(call).start();
    case 2: return Lut<TwoOfEight>(call).start();
    case 3: return Lut<OneOfEight>(call).start();
    default: return -1;
  }
}

}  // namespace
