// SPDX-License-Identifier: Apache-2.0
#include "net_weights.h"

#include <cmath>
#include <cstring>

namespace {

int bits_of(int64_t of) { return of > 1 ? 64 - __builtin_clzll(static_cast<uint64_t>(of - 1)) : 0; }

float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31;
  if (exponent == 0) {
    const float small = std::ldexp(static_cast<float>(h & 0x3ff), -24);
    return sign ? -small : small;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) |
                        static_cast<uint32_t>(h & 0x3ff) << 13;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

bool is_vector(const NetTensor *t, int64_t size) {
  return t->dtype == 0 && t->rank == 1 && t->shape[0] == size;
}

}  // namespace

bool StoredWeight::fits() const {
  if (!values || !indices || keep < 1 || of < keep || of > 64) return false;
  int64_t count = 0;
  const int64_t blocks = (inputs + of - 1) / of;
  if (__builtin_mul_overflow(taps * blocks, keep, &count)) return false;
  const int64_t row_bytes = (count * bits_of(of) + 7) / 8;
  if (values->rank != 2 || values->shape[0] != outputs || values->shape[1] != count ||
      values->dtype > 3 || indices->dtype != 4 || indices->rank != 2 ||
      indices->shape[0] != outputs || indices->shape[1] != row_bytes)
    return false;
  if ((values->dtype == 3) != (scale != nullptr)) return false;
  if (scale && !is_vector(scale, outputs)) return false;
  if (channels && channels * pixels != inputs) return false;
  return !bias || is_vector(bias, outputs);
}

float StoredWeight::value(int64_t at) const {
  if (values->dtype == 3) return static_cast<float>(static_cast<int8_t>(values->data[at]));
  if (values->dtype == 0) {
    float x;
    memcpy(&x, values->data + 4 * at, 4);
    return x;
  }
  uint16_t half;
  memcpy(&half, values->data + 2 * at, 2);
  if (values->dtype == 1) return from_half(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;  // BF16
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

int64_t StoredWeight::position(int64_t row, int64_t at) const {
  const int bits = bits_of(of);
  const uint8_t *from = indices->data + row * indices->shape[1];
  int64_t position = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = at * bits + b;
    position |= static_cast<int64_t>(from[bit / 8] >> (bit % 8) & 1) << b;
  }
  return position;
}

bool StoredWeight::lay_out(float *to, int64_t stride) const {
  const int64_t blocks = (inputs + of - 1) / of, count = taps * blocks * keep;
  const int64_t group_outputs = outputs / groups;
  float *biases = to + groups * inputs * taps * stride;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t group = o / group_outputs, lane = o % group_outputs;
    float factor = 1.0f;
    if (scale) memcpy(&factor, scale->data + 4 * o, 4);
    for (int64_t at = 0, before = -1; at < count; ++at) {
      const int64_t block = at / keep % blocks, tap = at / keep / blocks;
      const int64_t position = this->position(o, at);
      if (at % keep == 0) before = -1;
      if (position >= of || position <= before) return false;
      before = position;
      const float weight = scale ? value(o * count + at) * factor : value(o * count + at);
      const int64_t stored = block * of + position;
      if (!std::isfinite(weight) || (stored >= inputs && weight != 0.0f)) return false;
      if (stored >= inputs) continue;  // fills up the last, shorter block
      const int64_t input =
          channels ? stored % pixels * channels + stored / pixels : stored;
      const int64_t place = tap / kw * kw + (kw - 1 - tap % kw);
      to[((group * inputs + input) * taps + place) * stride + lane] = weight;
    }
    if (bias) memcpy(biases + group * stride + lane, bias->data + 4 * o, 4);
  }
  return true;
}
