// SPDX-License-Identifier: Apache-2.0
// Dense matrix tiles (AMX) fed with spikes: exact in fp32, whatever the rate and the pattern.
//
// Spikes are 0 or 1, so a product is the weight itself.  An fp32 weight is exactly the sum of three
// bf16 numbers (3 x 8 bits of significand), hence three bf16 tile products accumulated in fp32
// give the fp32 result up to the order of summation.  int8 weights need one tile product.
#pragma once
#include "epilogue.h"

namespace {

constexpr int ROWS = 16, COLS = 16;    // of a tile of sums: tokens x output channels
constexpr int TILE_BYTES = 1024;       // 16 rows of 64 bytes
constexpr int AMX_BLOCK = 256;         // input channels whose spikes are expanded at once
constexpr int AMX_TOKENS = 2 * ROWS, AMX_OUTPUTS = 2 * COLS;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// kInteger: int8 weights, 64 channels a tile; else three bf16 terms, 32 channels a tile.
template <bool kInteger>
struct Amx {
  static constexpr int kChannels = kInteger ? 64 : 32, kTerms = kInteger ? 1 : 3;
  static constexpr int64_t kStep = kTerms * 2 * TILE_BYTES;  // weights of one tile of channels
  const snm_call *call;
  Tokens tokens;
  Split s;
  int64_t row_bytes, group_bytes, out_blocks, group_steps;

  explicit Amx(const snm_call *c) : call(c), tokens(c->geometry) {
    const snm_geometry *g = c->geometry;
    s = split(g, c->threads, TILE, 256, 512, 64);
    group_bytes = ceil_div(g->cg, 64) * 8;
    row_bytes = g->groups * group_bytes;
    out_blocks = ceil_div(g->og, AMX_OUTPUTS);
    const int64_t *last = c->blocks + 5 * (c->n_blocks - 1);
    group_steps = last[3] + ceil_div(last[2], kChannels);
  }

  static void item(void *self, int64_t index) { static_cast<const Amx *>(self)->run(index); }

  int32_t start() {
    snm_parallel(s.items(call->geometry), call->threads, item, this);
    return 0;
  }

  void run(int64_t index) const {
    const snm_geometry *g = call->geometry;
    const auto [group, o0, p0, outputs] = s.piece(g, index);
    const int64_t count = g->steps * s.pixels;
    const int64_t stride = ceil_div(outputs, AMX_OUTPUTS) * AMX_OUTPUTS;
    float *y = static_cast<float *>(snm_scratch(0, sizeof(float) * count * stride));
    uint8_t *spikes = static_cast<uint8_t *>(
        snm_scratch(1, static_cast<size_t>(count) * 64 * (AMX_BLOCK / kChannels)));
    const uint8_t *nothing = zero_row(row_bytes);
    const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t b = 0; b < call->n_blocks; ++b) {
      const int64_t *block = call->blocks + 5 * b;
      const int64_t steps = ceil_div(block[2], kChannels);
      expand(group, p0, block, steps, nothing, spikes);
      // Weights: [group][32 outputs][block][channel tile][term][2][tile]
      for (int64_t o = 0; o < stride; o += AMX_OUTPUTS) {
        const uint8_t *w = reinterpret_cast<const uint8_t *>(call->weights) +
                           ((group * out_blocks + (o0 + o) / AMX_OUTPUTS) * group_steps + block[3]) *
                               kStep;
        for (int64_t t = 0; t < count; t += AMX_TOKENS)
          multiply(spikes + t * 64 * steps, w, steps, y + t * stride + o, stride, b == 0);
      }
    }
    _tile_release();
    if constexpr (kInteger)
      for (int64_t i = 0; i < count * stride; ++i) {
        int32_t sum;
        memcpy(&sum, y + i, sizeof sum);
        y[i] = static_cast<float>(sum);
      }
    Epilogue<false>(call).finish({y, stride, o0, outputs, p0, s.pixels}, group * g->og + o0);
  }

  // 32 tokens x 32 outputs over one block.
  static void multiply(const uint8_t *a, const uint8_t *w, int64_t steps, float *y, int64_t stride,
                       bool first) {
    const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, y, bytes);
      _tile_loadd(1, y + COLS, bytes);
      _tile_loadd(2, y + ROWS * stride, bytes);
      _tile_loadd(3, y + ROWS * stride + COLS, bytes);
    }
    for (int64_t k = 0; k < steps; ++k, a += 2 * TILE_BYTES, w += kStep) {
      _tile_loadd(4, a, 64);
      _tile_loadd(5, a + TILE_BYTES, 64);
#pragma GCC unroll 3
      for (int term = 0; term < kTerms; ++term) {
        _tile_loadd(6, w + term * 2 * TILE_BYTES, 64);
        _tile_loadd(7, w + term * 2 * TILE_BYTES + TILE_BYTES, 64);
        if constexpr (kInteger) {
          _tile_dpbusd(0, 4, 6);
          _tile_dpbusd(1, 4, 7);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        } else {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, y, bytes);
    _tile_stored(1, y + COLS, bytes);
    _tile_stored(2, y + ROWS * stride, bytes);
    _tile_stored(3, y + ROWS * stride + COLS, bytes);
  }

  // Bits to tiles of ones: [32 tokens][channel tile][2][16 tokens][64 bytes].
  void expand(int64_t group, int64_t p0, const int64_t *block, int64_t steps,
              const uint8_t *nothing, uint8_t *spikes) const {
    const uint8_t *rows[AMX_TOKENS];
    const int64_t count = tokens.g->steps * s.pixels;
    const int64_t at = group * group_bytes + block[1] / 8;
    for (int64_t t = 0; t < count; t += AMX_TOKENS, spikes += AMX_TOKENS * 64 * steps) {
      tokens.rows(static_cast<const uint8_t *>(call->input), row_bytes, nothing, t / s.pixels,
                  block[0], p0 + t % s.pixels, AMX_TOKENS, rows);
      for (int64_t i = 0; i < AMX_TOKENS; ++i)
        for (int64_t k = 0; k < steps; ++k) {
          uint8_t *out = spikes + (k * AMX_TOKENS + i) * 64;
          const uint8_t *in = rows[i] + at + k * (kChannels / 8);
          if constexpr (kInteger) {
            uint64_t bits;
            memcpy(&bits, in, sizeof bits);
            _mm512_store_si512(out, _mm512_maskz_set1_epi8(bits, 1));
          } else {
            uint32_t bits;
            memcpy(&bits, in, sizeof bits);
            _mm512_store_si512(out, _mm512_maskz_set1_epi16(bits, 0x3f80));  // bf16 one
          }
        }
    }
  }
};

}  // namespace
