// SPDX-License-Identifier: Apache-2.0
#include "net_weights.h"

#include <cmath>
#include <cstring>

#include "half.h"

namespace {

constexpr int64_t kSlack = 128;  // vectors read over the end of a row

bool is_vector(const NetTensor *t, int64_t size) {
  return t->dtype == kF32 && t->rank == 1 && t->shape[0] == size;
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t read_bits(const uint8_t *from, int64_t first, int64_t count) {
  int64_t found = 0;
  for (int64_t b = 0; b < count; ++b)
    found |= static_cast<int64_t>(from[(first + b) / 8] >> ((first + b) % 8) & 1) << b;
  return found;
}

void write_bits(uint8_t *to, int64_t first, int64_t count, int64_t bits) {
  for (int64_t b = 0; b < count; ++b)
    to[(first + b) / 8] |= static_cast<uint8_t>((bits >> b & 1) << ((first + b) % 8));
}

}  // namespace

bool StoredWeight::fits() const {
  if (!values || !indices || keep < 1 || of < keep || of > 64) return false;
  int64_t count = 0;
  if (__builtin_mul_overflow(taps * blocks(), keep, &count)) return false;
  const int64_t row_bytes = (count * position_bits(of) + 7) / 8;
  if (values->rank != 2 || values->shape[0] != outputs || values->shape[1] != count ||
      values->dtype > kI8 || indices->dtype != kU8 || indices->rank != 2 ||
      indices->shape[0] != outputs || indices->shape[1] != row_bytes)
    return false;
  if ((values->dtype == kI8) != (scale != nullptr)) return false;
  if (scale && !is_vector(scale, outputs)) return false;
  if (channels && channels * pixels != inputs) return false;
  return !bias || is_vector(bias, outputs);
}

bool StoredWeight::plan(bool small, int64_t stride, NetLayerMemory *m) const {
  const int64_t group_outputs = outputs / groups, row = groups * stride;
  int64_t weights = 0;
  if (small) {
    m->form = kPackedRows;
    m->code_bytes = (group_outputs + 7) / 8 * position_bits(of);
    const int64_t rows = groups * kept();
    weights = aligned(rows * group_outputs * element() + kSlack);
    m->codes = weights;
    weights += aligned(rows * m->code_bytes + kSlack);
  } else {
    m->form = values->dtype == kI8 ? kDense8Rows : kDenseRows;
    m->codes = m->code_bytes = 0;
    int64_t rows = 0;
    if (__builtin_mul_overflow(inputs * taps, row, &rows) || rows > (1ll << 36)) return false;
    weights = aligned(rows * (m->form == kDense8Rows ? 1 : 4));
  }
  m->bias = weights;
  m->scale = scale ? weights + row * 4 : 0;
  m->size = weights + row * 4 + (scale ? kw * row * 4 + kSlack : 0);
  return true;
}

float StoredWeight::value(int64_t at) const {
  if (values->dtype == kI8) return static_cast<float>(static_cast<int8_t>(values->data[at]));
  if (values->dtype == kF32) {
    float x;
    memcpy(&x, values->data + 4 * at, 4);
    return x;
  }
  uint16_t half;
  memcpy(&half, values->data + 2 * at, 2);
  return values->dtype == kF16 ? from_half(half) : from_brain(half);
}

// The row that holds a kept value: `at` runs over (tap, block, kept) of an output.
int64_t StoredWeight::packed_row(int64_t output, int64_t at) const {
  const int64_t group = output / (outputs / groups);
  const int64_t j = at % keep, block = at / keep % blocks(), tap = at / keep / blocks();
  const int64_t place = tap / kw * kw + (kw - 1 - tap % kw);
  return ((group * blocks() + block) * taps + place) * keep + j;
}

int64_t StoredWeight::dense_row(int64_t output, int64_t at, int64_t position) const {
  const int64_t group = output / (outputs / groups);
  const int64_t block = at / keep % blocks(), tap = at / keep / blocks();
  const int64_t stored = block * of + position;
  const int64_t input = channels ? stored % pixels * channels + stored / pixels : stored;
  const int64_t place = tap / kw * kw + (kw - 1 - tap % kw);
  return (group * inputs + input) * taps + place;
}

// Place of an output's position in a packed row.
int64_t StoredWeight::code_bit(int64_t output) const {
  return output % (outputs / groups) * position_bits(of);
}

bool StoredWeight::lay_out(char *to, const NetLayerMemory &m, int64_t stride) const {
  const int64_t group_outputs = outputs / groups, bits = position_bits(of), size = element();
  uint8_t *codes = reinterpret_cast<uint8_t *>(to) + m.codes;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t lane = o % group_outputs, padded = o / group_outputs * stride + lane;
    const uint8_t *row = indices->data + o * indices->shape[1];
    float factor = 1.0f;
    if (scale) memcpy(&factor, scale->data + 4 * o, 4);
    if (!std::isfinite(factor)) return false;
    for (int64_t at = 0, before = -1; at < kept(); ++at) {
      const int64_t position = read_bits(row, at * bits, bits);
      if (at % keep == 0) before = -1;
      if (position >= of || position <= before) return false;
      before = position;
      const bool within = at / keep % blocks() * of + position < inputs;
      const float weight = value(o * kept() + at) * factor;
      // Beyond the last input zeros fill up the last, shorter block.
      if (!std::isfinite(weight) || (!within && weight != 0.0f)) return false;
      if (m.form == kPackedRows) {
        const int64_t r = packed_row(o, at);
        memcpy(to + (r * group_outputs + lane) * size, values->data + (o * kept() + at) * size,
               static_cast<size_t>(size));
        write_bits(codes + r * m.code_bytes, code_bit(o), bits, position);
      } else if (within && m.form == kDense8Rows) {
        to[dense_row(o, at, position) * stride + lane] =
            static_cast<char>(values->data[o * kept() + at]);
      } else if (within) {
        memcpy(to + 4 * (dense_row(o, at, position) * stride + lane), &weight, 4);
      }
    }
    const int64_t used = kept() * bits;
    if (read_bits(row, used, indices->shape[1] * 8 - used)) return false;
    if (bias) memcpy(to + m.bias + 4 * padded, bias->data + 4 * o, 4);
    for (int64_t k = 0; k < kw && scale; ++k)
      memcpy(to + m.scale + 4 * (k * groups * stride + padded), &factor, 4);
  }
  return true;
}

void StoredWeight::read_back(const char *from, const NetLayerMemory &m, uint8_t *to_values,
                             uint8_t *to_indices) const {
  const int64_t group_outputs = outputs / groups, bits = position_bits(of), size = element();
  const uint8_t *codes = reinterpret_cast<const uint8_t *>(from) + m.codes;
  const int64_t row_bytes = (kept() * bits + 7) / 8;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t at = 0; at < kept(); ++at) {
      const int64_t r = packed_row(o, at);
      if (to_values)
        memcpy(to_values + (o * kept() + at) * size,
               from + (r * group_outputs + o % group_outputs) * size, static_cast<size_t>(size));
      if (to_indices)
        write_bits(to_indices + o * row_bytes, at * bits, bits,
                   read_bits(codes + r * m.code_bytes, code_bit(o), bits));
    }
}
