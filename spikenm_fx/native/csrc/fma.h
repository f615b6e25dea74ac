// SPDX-License-Identifier: Apache-2.0
// Packed multiply-add: any N:M, any activation.  Every kept weight picks one row of a panel
// [input channel][token] that fits L1; two output rows share the loads of a register tile.
#pragma once
#include "epilogue.h"
#include "half.h"
#include "net.h"

namespace {

#if defined(__AVX512BW__) || defined(__ARM_NEON)
constexpr int NV = 8;  // vectors of tokens per register tile: 2 * NV accumulators
#else
constexpr int NV = 4;
#endif
constexpr int FMA_TOKENS = NV * VW;
constexpr int FMA_MAX_BLOCK = 256;  // indices inside a block are bytes

// Two rows over one panel.  values, picks: [non-zero][2]; y0, y1: where vector 0 of a row lies,
// vector j lying at offset[j].
template <int kVectors>
SNM_INLINE void fma_pair(const float *panel, const float *values, const uint8_t *picks,
                         int64_t nonzeros, float *const *y, const int64_t *offset, bool first) {
  vf a[kVectors], b[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    a[j] = first ? vf{} : load(y[0] + offset[j]);
    b[j] = first ? vf{} : load(y[1] + offset[j]);
  }
  for (int64_t i = 0; i < nonzeros; ++i) {
    const vf w0 = splat(values[2 * i]), w1 = splat(values[2 * i + 1]);
    const float *x0 = panel + picks[2 * i] * FMA_TOKENS;
    const float *x1 = panel + picks[2 * i + 1] * FMA_TOKENS;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      a[j] = madd(w0, load(x0 + j * VW), a[j]);
      b[j] = madd(w1, load(x1 + j * VW), b[j]);
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    store(y[0] + offset[j], a[j]);
    store(y[1] + offset[j], b[j]);
  }
}

struct Fma {
  const snm_call *call;
  Tokens tokens;
  Split s;
  int64_t row_bytes, pairs, group_nonzeros;

  explicit Fma(const snm_call *c) : call(c), tokens(c->geometry) {
    const snm_geometry *g = c->geometry;
    s = split(g, c->threads, TILE, 256, 512, 64);
    row_bytes = g->groups * g->cg * static_cast<int64_t>(sizeof(float));
    pairs = ceil_div(g->og, 2);
    const int64_t *last = c->blocks + 5 * (c->n_blocks - 1);
    group_nonzeros = last[3] + nonzeros(last);
  }

  // kind = stored << 32 | keep << 16 | of
  int64_t nonzeros(const int64_t *block) const {
    return ceil_div(block[2], of()) * keep();
  }

  int64_t of() const { return call->kind & 0xffff; }
  int64_t keep() const { return call->kind >> 16 & 0xffff; }
  // Not 0: weights are a file's values and codes its indices, as they are stored: 1 + NetType.
  int64_t stored() const { return call->kind >> 32; }

  static void item(void *self, int64_t index) { static_cast<const Fma *>(self)->run(index); }

  int32_t start() {
    if (of() < 1 || of() > FMA_MAX_BLOCK || keep() < 1 || keep() > of() || stored() > 1 + kI8 ||
        !blocks_fit(call, FMA_MAX_BLOCK, of(), keep()))
      return -1;
    snm_parallel(s.items(call->geometry), call->threads, item, this);
    return 0;
  }

  void run(int64_t index) const {
    const snm_geometry *g = call->geometry;
    const auto [group, o0, p0, outputs] = s.piece(g, index);
    const int64_t padded = ceil_div(outputs, 16) * 16, count = g->steps * s.pixels;
    float *y = static_cast<float *>(snm_scratch(0, sizeof(float) * count * padded));
    float *panel = static_cast<float *>(
        snm_scratch(1, sizeof(float) * (FMA_MAX_BLOCK + VW) * FMA_TOKENS));
    const uint8_t *nothing = zero_row(row_bytes);
    // Panels outside, K-blocks inside: a panel is built once per (tokens, block) and the sums of
    // its tokens stay in L2.
    for (int64_t k0 = 0; k0 < count; k0 += FMA_TOKENS)
      for (int64_t b = 0; b < call->n_blocks; ++b) {
        const int64_t *block = call->blocks + 5 * b;
        build_panel(group, p0, k0, least(FMA_TOKENS, count - k0), block, nothing, panel);
        rows(group, block, o0, outputs, padded, k0, least(FMA_TOKENS, count - k0), panel, y,
             b == 0);
      }
    Epilogue<true>(call).finish({y, padded, o0, outputs, p0, s.pixels}, group * g->og + o0);
  }

  void rows(int64_t group, const int64_t *block, int64_t o0, int64_t outputs, int64_t padded,
            int64_t k0, int64_t count, const float *panel, float *y, bool first) const {
    const int64_t n = nonzeros(block);
    // Values and picks: [group][block][output pair][non-zero][2]
    const int64_t at = (group * group_nonzeros + block[3]) * pairs * 2 + o0 / 2 * n * 2;
    const float *values = stored() ? nullptr : call->weights + at;
    const uint8_t *picks = stored() ? nullptr : static_cast<const uint8_t *>(call->codes) + at;
    int64_t offset[NV];
    for (int j = 0; j < NV; ++j) {
      const int64_t token = k0 + j * VW;
      offset[j] = token / TILE * padded * TILE + token % TILE;
    }
    alignas(64) float own_values[2 * FMA_MAX_BLOCK];
    uint8_t own_picks[2 * FMA_MAX_BLOCK];
    for (int64_t o = 0; o < outputs; o += 2) {
      if (stored()) {
        values = own_values, picks = own_picks;
        for (int64_t side = 0; side < 2; ++side)
          unpack(group, o0 + o + side, block, n, own_values + side, own_picks + side);
      }
      float *out[2] = {y + o * TILE, y + (o + 1) * TILE};  // rows are padded to an even number
      if (count == FMA_TOKENS)
        fma_pair<NV>(panel, values, picks, n, out, offset, first);
      else
        fma_pair<NV / 2>(panel, values, picks, n, out, offset, first);
      if (!stored()) values += 2 * n, picks += 2 * n;
    }
  }

  // Values and picks of one row of a block, every second place; a row beyond the last is zeros.
  void unpack(int64_t group, int64_t output, const int64_t *block, int64_t n, float *values,
              uint8_t *picks) const {
    const snm_geometry *g = call->geometry;
    for (int64_t i = 0; i < n && output >= g->og; ++i) values[2 * i] = 0.0f, picks[2 * i] = 0;
    if (output >= g->og) return;
    const int64_t per_tap = ceil_div(g->cg, of()) * keep(), count = g->kh * g->kw * per_tap;
    const int64_t bits = position_bits(of()), row = group * g->og + output;
    const int64_t at = block[0] * per_tap + block[1] / of() * keep();
    const uint8_t *codes = static_cast<const uint8_t *>(call->codes) + row * ((count * bits + 7) / 8);
    for (int64_t i = 0; i < n; ++i) {
      int64_t position = 0;
      for (int64_t b = 0; b < bits; ++b) {
        const int64_t bit = (at + i) * bits + b;
        position |= static_cast<int64_t>(codes[bit / 8] >> (bit % 8) & 1) << b;
      }
      picks[2 * i] = static_cast<uint8_t>(i / keep() * of() + position);
      values[2 * i] = stored_value(row * count + at + i);
    }
  }

  float stored_value(int64_t at) const {
    if (stored() == 1 + kF32) return call->weights[at];
    if (stored() == 1 + kI8)
      return static_cast<float>(reinterpret_cast<const int8_t *>(call->weights)[at]);
    const uint16_t half = reinterpret_cast<const uint16_t *>(call->weights)[at];
    return stored() == 1 + kF16 ? from_half(half) : from_brain(half);
  }

  // panel[channel][token] for the channels of one block; channels beyond the last are zero.
  void build_panel(int64_t group, int64_t p0, int64_t k0, int64_t count, const int64_t *block,
                   const uint8_t *nothing, float *panel) const {
    const int64_t first = group * call->geometry->cg + block[1];
    for (int64_t k = 0; k < count; k += VW) {
      const uint8_t *rows[VW];
      const int64_t token = k0 + k;
      tokens.rows(static_cast<const uint8_t *>(call->input), row_bytes, nothing,
                  token / s.pixels, block[0], p0 + token % s.pixels, VW, rows);
      for (int64_t c = 0; c < block[2]; c += VW) {
        float *out = panel + c * FMA_TOKENS + k;
        const auto row = [&](int64_t i) {
          return reinterpret_cast<const float *>(rows[i]) + first + c;
        };
        if (c + VW <= block[2]) {
          transpose_rows(row, out, FMA_TOKENS);
        } else {
          alignas(64) float part[VW * VW] = {};
          for (int64_t i = 0; i < VW; ++i)
            for (int64_t j = 0; j < block[2] - c; ++j) part[i * VW + j] = row(i)[j];
          transpose(part, VW, out, FMA_TOKENS);
        }
      }
    }
    // Filled-up slots of a shorter last block may pick a channel beyond it: its value is zero, but
    // zero times a stale NaN would not be.
    const int64_t whole = ceil_div(block[2], of()) * of();
    for (int64_t c = ceil_div(block[2], VW) * VW; c < whole; ++c)
      memset(panel + c * FMA_TOKENS, 0, sizeof(float) * FMA_TOKENS);
  }
};

int32_t fma(const snm_call *call) { return Fma(call).start(); }

}  // namespace
