// SPDX-License-Identifier: Apache-2.0
#include "net_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"

namespace {

constexpr int64_t kSlack = 128;  // vectors read over the end of a row

bool is_vector(const NetTensor *t, int64_t size) {
  return t->dtype == kF32 && t->rank == 1 && t->shape[0] == size;
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// At most eight bits, of which none lies beyond the memory.
int64_t read_bits(const uint8_t *from, int64_t first, int64_t count) {
  const int64_t shift = first % 8;
  uint32_t word = count ? from[first / 8] : 0;
  if (shift + count > 8) word |= static_cast<uint32_t>(from[first / 8 + 1]) << 8;
  return word >> shift & ((1u << count) - 1);
}

void write_bits(uint8_t *to, int64_t first, int64_t count, int64_t bits) {
  const int64_t shift = first % 8;
  to[first / 8] |= static_cast<uint8_t>(bits << shift);
  if (shift + count > 8) to[first / 8 + 1] |= static_cast<uint8_t>(bits >> (8 - shift));
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
    m->form = values->dtype == kI8 ? kDense8Rows : gathers ? kTapRows : kDenseRows;
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

// Where the taps of a row of the kernel lie, from its end.
int64_t StoredWeight::place_of(int64_t tap) const { return tap / kw * kw + (kw - 1 - tap % kw); }

// The row that holds a kept value: `at` runs over (tap, block, kept) of an output.
int64_t StoredWeight::packed_row(int64_t output, int64_t at) const {
  const int64_t group = output / (outputs / groups);
  const int64_t j = at % keep, block = at / keep % blocks(), tap = at / keep / blocks();
  return ((group * blocks() + block) * taps + place_of(tap)) * keep + j;
}

// Place of an output's position in a packed row.
int64_t StoredWeight::code_bit(int64_t output) const {
  return output % (outputs / groups) * position_bits(of);
}

bool StoredWeight::lay_out(char *to, const NetLayerMemory &m, int64_t stride) const {
  const int64_t group_outputs = outputs / groups, used = kept() * position_bits(of);
  for (int64_t first = 0; first < outputs; first += kTogether)
    if (!lay_out_some(to, m, stride, first, std::min(kTogether, outputs - first))) return false;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t padded = o / group_outputs * stride + o % group_outputs;
    const uint8_t *row = indices->data + o * indices->shape[1];
    if (read_bits(row, used, indices->shape[1] * 8 - used)) return false;
    if (bias) memcpy(to + m.bias + 4 * padded, bias->data + 4 * o, 4);
    for (int64_t k = 0; k < kw && scale; ++k)
      memcpy(to + m.scale + 4 * (k * groups * stride + padded), scale->data + 4 * o, 4);
  }
  return true;
}

// Outputs side by side, as many as share a line of the cache in rows of floats.
bool StoredWeight::lay_out_some(char *to, const NetLayerMemory &m, int64_t stride, int64_t first,
                                int64_t count) const {
  const int64_t group_outputs = outputs / groups, bits = position_bits(of), all = kept();
  int64_t group[kTogether], lane[kTogether], before[kTogether];
  float factor[kTogether];
  for (int64_t r = 0; r < count; ++r) {
    group[r] = (first + r) / group_outputs, lane[r] = (first + r) % group_outputs;
    factor[r] = 1.0f;
    if (scale) memcpy(factor + r, scale->data + 4 * (first + r), 4);
    if (!std::isfinite(factor[r])) return false;
  }
  int64_t at = 0;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t block = 0; block < blocks(); ++block)
      for (int64_t j = 0; j < keep; ++j, ++at)
        for (int64_t r = 0; r < count; ++r) {
          const int64_t o = first + r, from = o * all + at;
          const int64_t position = read_bits(indices->data + o * indices->shape[1], at * bits, bits);
          if (position >= of || (j && position <= before[r])) return false;
          before[r] = position;
          const int64_t input = block * of + position;
          const float weight = value(from) * factor[r];
          // Beyond the last input zeros fill up the last, shorter block.
          if (!std::isfinite(weight) || (input >= inputs && weight != 0.0f)) return false;
          if (m.form == kPackedRows)
            put_packed(to, m, ((group[r] * blocks() + block) * taps + place_of(tap)) * keep + j, o,
                       from, position);
          else if (m.form == kTapRows && input < inputs)
            put_dense(to, m, tap_row(o, stride, input, tap), from, weight);
          else if (input < inputs)
            put_dense(to, m, dense_row(group[r], input, tap) * stride + lane[r], from, weight);
        }
  return true;
}

void StoredWeight::put_packed(char *to, const NetLayerMemory &m, int64_t row, int64_t output,
                              int64_t from, int64_t position) const {
  const int64_t group_outputs = outputs / groups, size = element();
  memcpy(to + (row * group_outputs + output % group_outputs) * size, values->data + from * size,
         static_cast<size_t>(size));
  write_bits(reinterpret_cast<uint8_t *>(to) + m.codes + row * m.code_bytes, code_bit(output),
             position_bits(of), position);
}

void StoredWeight::put_dense(char *to, const NetLayerMemory &m, int64_t at, int64_t from,
                             float weight) const {
  if (m.form == kDense8Rows)
    to[at] = static_cast<char>(values->data[from]);
  else
    memcpy(to + 4 * at, &weight, 4);
}

// Of rows of one group.
int64_t StoredWeight::tap_row(int64_t output, int64_t stride, int64_t input, int64_t tap) const {
  const int64_t first = output / kOutputBlock * kOutputBlock;
  const int64_t width = std::min(kOutputBlock, stride - first);
  return first * taps * inputs + (tap * inputs + input) * width + output - first;
}

int64_t StoredWeight::dense_row(int64_t group, int64_t stored, int64_t tap) const {
  const int64_t input = channels ? stored % pixels * channels + stored / pixels : stored;
  return (group * inputs + input) * taps + place_of(tap);
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
