// SPDX-License-Identifier: Apache-2.0
// The events of many tokens as lists, pixel after pixel, made once for all that reads them.
#pragma once
#include "stream.h"

namespace {

// The events of many tokens, and where those of each pixel start.
struct EventLists {
  const NetValue *in;
  int64_t pixels, room, bytes;  // bytes: of one token
  char *memory;

  explicit EventLists(const NetValue *v) : in(v), pixels(v->h * v->w) {
    room = ceil_div(v->size, 64) * 64 + 64;
    bytes = ceil_div((room * (v->bits ? 1 : 2) + pixels + 2) * 4, 64) * 64;
    memory = nullptr;
  }

  void take(int64_t tokens) {
    memory = static_cast<char *>(snm_scratch(6, static_cast<size_t>(tokens * bytes)));
  }

  // How far the row of each event lies behind that of the first number, in bytes of whole blocks.
  uint32_t *offset(int64_t token) const {
    return reinterpret_cast<uint32_t *>(memory + token * bytes);
  }
  float *value(int64_t token) const { return reinterpret_cast<float *>(offset(token)) + room; }
  // Of each pixel, and behind the last one: 1 where all values are 1.
  int32_t *starts(int64_t token) const {
    return reinterpret_cast<int32_t *>(offset(token)) + room * (in->bits ? 1 : 2);
  }
  bool ones(int64_t token) const { return starts(token)[pixels + 1] != 0; }

  void fill(int64_t token, const void *from) const {
    const int64_t words = ceil_div(in->size, 64);
    const size_t needed = sizeof(uint64_t) * static_cast<size_t>(2 * words);
    uint64_t *bits = static_cast<uint64_t *>(snm_scratch(2, needed));
    int32_t *before = reinterpret_cast<int32_t *>(bits + words);
    uint32_t *found = offset(token);
    float *values = value(token);
    bool ones = true;
    const float *x = static_cast<const float *>(from);
    if (!in->bits) ones = bits_of(x, bits);
    const uint64_t *there = in->bits ? static_cast<const uint64_t *>(from) : bits;
    int32_t n = 0;
    for (int64_t w = 0; w < words; ++w) {
      before[w] = n;
      if (in->bits || ones)
        for (uint64_t word = there[w]; word; word &= word - 1)
          found[n++] = row_of(w * 64 + __builtin_ctzll(word));
      else
        for (uint64_t word = there[w]; word; word &= word - 1) {
          const int64_t at = w * 64 + __builtin_ctzll(word);
          found[n] = row_of(at);
          values[n++] = x[at];
        }
    }
    int32_t *start = starts(token);
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t at = p * in->c;
      const uint64_t part = (1ull << at % 64) - 1;
      start[p] = before[at / 64] +
                 (part ? __builtin_popcountll(there[at / 64] & part) : 0);
    }
    start[pixels] = n;
    start[pixels + 1] = ones;
  }

 private:
  static uint32_t row_of(int64_t at) {
    return static_cast<uint32_t>(at) * static_cast<uint32_t>(kOutputBlock * sizeof(float));
  }

  // Which numbers are not zero; whether all of those are 1.  NaN is not zero.
  bool bits_of(const float *x, uint64_t *bits) const {
    vi others = {};
    for (int64_t i = 0; i < in->size; i += 64) {
      uint64_t word = 0;
      vi more = {};
      for (int64_t j = 0; j < 64; j += VW) {
        const vf v = loadu(x + i + j);  // up to 63 numbers behind the last one are there
        const vi there = ~reinterpret_cast<vi>(v == vf{});
        word |= static_cast<uint64_t>(lanes(there)) << j;
        more |= there & ~reinterpret_cast<vi>(v == splat(1.0f));
      }
      if (in->size - i >= 64) others |= more;
      else {
        word &= (1ull << (in->size - i)) - 1;
        for (uint64_t left = word; left; left &= left - 1)
          if (x[i + __builtin_ctzll(left)] != 1.0f) others |= ~vi{};
      }
      bits[i / 64] = word;
    }
    return lanes(others) == 0;
  }
};

}  // namespace
