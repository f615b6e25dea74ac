// SPDX-License-Identifier: Apache-2.0
// Event-driven sums: for every spike add one row of weights.  Work is proportional to the spike
// rate; weights may be dense.  A block of weights [input channel][output channel] fits L1 and is
// used for all tokens of an item before the next one.
#pragma once
#include "epilogue.h"

namespace {

constexpr int EVENT_INPUTS = 64;  // input channels of a block: one word of spikes

// Per weight type: the vector, and how many output channels an L1 block holds.
template <class W>
struct Weights;

template <>
struct Weights<float> {
  typedef vf vector;
  static constexpr int lanes = VW, outputs = 128, granule = 16;
};

template <>
struct Weights<int16_t> {
  typedef vs vector;
  static constexpr int lanes = 2 * VW, outputs = 256, granule = 32;
};

// Adds the rows of w that spikes name to kVectors accumulators of one token.
template <class W, int kVectors>
SNM_INLINE void add_rows(uint64_t spikes, const W *w, int64_t width,
                         typename Weights<W>::vector *sum) {
  typedef typename Weights<W>::vector vector;
  while (spikes) {
    const W *row = w + __builtin_ctzll(spikes) * width;
    spikes &= spikes - 1;
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j)
      sum[j] += *reinterpret_cast<const vector *>(row + j * Weights<W>::lanes);
  }
}

template <class W, int kVectors>
void event_pass(const uint64_t *spikes, int64_t tokens, const W *w, int64_t width, W *y,
                int64_t stride, bool first) {
  typedef typename Weights<W>::vector vector;
  for (int64_t t = 0; t < tokens; ++t, y += stride) {
    if (spikes[t] == 0 && !first) continue;
    vector sum[kVectors];
    for (int j = 0; j < kVectors; ++j)
      sum[j] = first ? vector{} : *reinterpret_cast<const vector *>(y + j * Weights<W>::lanes);
    add_rows<W, kVectors>(spikes[t], w, width, sum);
    for (int j = 0; j < kVectors; ++j)
      *reinterpret_cast<vector *>(y + j * Weights<W>::lanes) = sum[j];
  }
}

// All output channels of one weight block: as many vectors at a time as registers allow.
template <class W>
void event_block(const uint64_t *spikes, int64_t tokens, const W *w, int64_t width, W *y,
                 int64_t stride, bool first) {
  constexpr int lanes = Weights<W>::lanes;
  int64_t o = 0;
  for (; o + 8 * lanes <= width; o += 8 * lanes)
    event_pass<W, 8>(spikes, tokens, w + o, width, y + o, stride, first);
  for (; o + 4 * lanes <= width; o += 4 * lanes)
    event_pass<W, 4>(spikes, tokens, w + o, width, y + o, stride, first);
  for (; o < width; o += lanes)
    event_pass<W, 1>(spikes, tokens, w + o, width, y + o, stride, first);
}

// int16 sums of a finished segment of blocks, proven not to overflow, move to fp32, which holds
// the integer sums of any layer exactly (below 2^24).
SNM_INLINE void flush(const int16_t *y16, float *y, int64_t count, bool first) {
  for (int64_t i = 0; i < count; ++i) y[i] = (first ? 0.0f : y[i]) + static_cast<float>(y16[i]);
}

template <class W>
struct Event {
  static constexpr bool kInteger = sizeof(W) == 2;
  const snm_call *call;
  Tokens tokens;
  Split s;
  int64_t row_words, group_words, padded_outputs, group_channels;

  explicit Event(const snm_call *c) : call(c), tokens(c->geometry) {
    const snm_geometry *g = c->geometry;
    s = split(g, c->threads, TILE, 256, 512, Weights<W>::outputs);
    group_words = ceil_div(g->cg, 64);
    row_words = g->groups * group_words;
    padded_outputs = ceil_div(g->og, Weights<W>::granule) * Weights<W>::granule;
    const int64_t *last = c->blocks + 5 * (c->n_blocks - 1);
    group_channels = last[3] + last[2];
  }

  static void item(void *self, int64_t index) { static_cast<const Event *>(self)->run(index); }

  int32_t start() {
    if (!blocks_fit(call, EVENT_INPUTS, 1, 1) || (kInteger && !call->scale)) return -1;
    snm_parallel(s.items(call->geometry), call->threads, item, this);
    return 0;
  }

  void run(int64_t index) const {
    const snm_geometry *g = call->geometry;
    const auto [group, o0, p0, outputs] = s.piece(g, index);
    const int64_t stride = least(s.outputs, padded_outputs - o0), count = g->steps * s.pixels;
    float *y = static_cast<float *>(snm_scratch(0, sizeof(float) * count * stride));
    W *sums = kInteger ? static_cast<W *>(snm_scratch(1, sizeof(W) * count * stride))
                       : reinterpret_cast<W *>(y);
    uint64_t *spikes = static_cast<uint64_t *>(snm_scratch(2, sizeof(uint64_t) * count));
    const uint8_t *nothing = zero_row(row_words * 8);
    bool opens = true, flushed = false;
    for (int64_t b = 0; b < call->n_blocks; ++b) {
      const int64_t *block = call->blocks + 5 * b;
      gather(group, p0, block, nothing, spikes);
      for (int64_t o = 0; o < stride; o += Weights<W>::outputs) {
        const int64_t width = least(Weights<W>::outputs, padded_outputs - o0 - o);
        // Weights: [group][output block][block][input channel][output channel]
        const W *w = reinterpret_cast<const W *>(call->weights) +
                     group * padded_outputs * group_channels + (o0 + o) * group_channels +
                     block[3] * width;
        event_block<W>(spikes, count, w, width, sums + o, stride, opens);
      }
      opens = kInteger && block[4];
      if (opens) {
        if constexpr (kInteger) flush(sums, y, count * stride, !flushed);
        flushed = true;
      }
    }
    Epilogue<false>(call).finish({y, stride, o0, outputs, p0, s.pixels}, group * g->og + o0);
  }

  void gather(int64_t group, int64_t p0, const int64_t *block, const uint8_t *nothing,
              uint64_t *spikes) const {
    const uint8_t *rows[TILE];
    const int64_t count = tokens.g->steps * s.pixels;
    const int64_t at = (group * group_words + block[1] / 64) * 8;
    for (int64_t k = 0; k < count; k += TILE) {
      tokens.rows(static_cast<const uint8_t *>(call->input), row_words * 8, nothing,
                  k / s.pixels, block[0], p0 + k % s.pixels, TILE, rows);
      for (int64_t i = 0; i < TILE; ++i) memcpy(&spikes[k + i], rows[i] + at, 8);
    }
  }
};

int32_t event(const snm_call *call) { return Event<float>(call).start(); }
int32_t event8(const snm_call *call) { return Event<int16_t>(call).start(); }

}  // namespace
