// SPDX-License-Identifier: Apache-2.0
// Sums for one token from packed rows: of every block of inputs that is not silent, the kept
// values times what their positions pick from the block's inputs.  It reads a packed weight once,
// skips silent blocks, and adds in the order of inputs, as rows of floats are added.
#pragma once
#include "lookup.h"
#include "net.h"

namespace {

// Blocks of inputs that are not silent, and a table of inputs for each.
struct ActiveBlocks {
  int32_t *block;
  float *table;  // [block][room]
  int64_t count, of, room;
  bool finite;  // zero times any input is zero
};

// Of the events [first, first + n), whose inputs count from `base` on.
SNM_INLINE ActiveBlocks active_blocks(const int32_t *index, const float *value, int64_t n,
                                      int64_t base, int64_t of, bool ones) {
  const int64_t room = most(kTable, 1ll << position_bits(of));
  const size_t bytes = static_cast<size_t>(n + 1) * (sizeof(float) * room + sizeof(int32_t));
  float *tables = static_cast<float *>(snm_scratch(4, bytes));
  ActiveBlocks found = {reinterpret_cast<int32_t *>(tables + (n + 1) * room), tables, 0, of, room,
                        true};
  float poison = 0.0f;
  for (int64_t k = 0; k < n;) {
    const int64_t block = (index[k] - base) / of;
    float *table = tables + found.count * room;
    memset(table, 0, sizeof(float) * static_cast<size_t>(room));
    for (; k < n && (index[k] - base) / of == block; ++k) {
      const float x = ones ? 1.0f : value[k];
      table[(index[k] - base) % of] = x;
      poison += x * 0.0f;
    }
    for (int64_t size = 1ll << position_bits(of); size < room; size *= 2)
      memcpy(table + size, table, sizeof(float) * static_cast<size_t>(size));
    found.block[found.count++] = static_cast<int32_t>(block);
  }
  found.finite = poison == 0.0f;
  return found;
}

// Packed rows of one group and tap: those of block b start b * block_step rows after `first`.
template <class W>
struct PackedRows {
  const W *values;
  const uint8_t *codes;
  const float *scale;  // of integers, from output `from` on; else null
  int64_t keep, width, code_bytes, block_step, first, from;

  int64_t row(int64_t block, int64_t j) const { return first + block * block_step + j; }
  const W *weights(int64_t block, int64_t j) const { return values + row(block, j) * width + from; }
  const uint8_t *positions(int64_t block, int64_t j) const {
    return codes + row(block, j) * code_bytes;
  }
};

// y[0..count) += kBlocks blocks, one after another.
template <int kBits, int kBlocks, class W>
SNM_INLINE void add_blocks(const PackedRows<W> &rows, const int32_t *block, const float *table,
                           int64_t room, float *y, int64_t count) {
  const W *weights[kBlocks];
  const uint8_t *codes[kBlocks];
  const Picks picks[4] = {Picks(table), Picks(table + (kBlocks > 1 ? room : 0)),
                          Picks(table + (kBlocks > 2 ? 2 * room : 0)),
                          Picks(table + (kBlocks > 3 ? 3 * room : 0))};
  for (int b = 0; b < kBlocks; ++b) {
    weights[b] = rows.weights(block[b], 0);
    codes[b] = rows.positions(block[b], 0);
  }
  for (int64_t o = 0; o < count; o += VW) {
    vf sum = loadu(y + o);
    const vf factor = sizeof(W) == 1 ? loadu(rows.scale + o) : vf{};
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b)
      for (int64_t j = 0; j < rows.keep; ++j) {
        vf w = weights_at(weights[b] + j * rows.width + o);
        if (sizeof(W) == 1) w = w * factor;
        const vw at = kBits ? positions_at<kBits>(codes[b] + j * rows.code_bytes, rows.from + o)
                            : vw{};
        sum = madd(looked_up<kBits>(picks[b], table + b * room, at), w, sum);
      }
    storeu(y + o, sum);
  }
}

// As a row of floats gives: an input that is not finite is no number for all that it reaches with
// a weight of zero.
template <int kBits, class W>
void add_poison(const PackedRows<W> &rows, const ActiveBlocks &active, float *y, int64_t count) {
  for (int64_t b = 0; b < active.count; ++b)
    for (int64_t k = 0; k < active.of; ++k) {
      const float nothing = active.table[b * active.room + k] * 0.0f;
      if (nothing == 0.0f) continue;
      for (int64_t o = 0; o < count; ++o) {
        bool kept = false;
        for (int64_t j = 0; j < rows.keep; ++j) {
          const int64_t out = rows.from + o;
          const uint8_t *codes = rows.positions(active.block[b], j);
          int64_t position = 0;
          for (int bit = 0; bit < kBits; ++bit) {
            const int64_t at = out * kBits + bit;
            position |= static_cast<int64_t>(codes[at / 8] >> (at % 8) & 1) << bit;
          }
          kept |= position == k;
        }
        if (!kept) y[o] += nothing;
      }
    }
}

template <int kBits, class W>
void add_active(const PackedRows<W> &rows, const ActiveBlocks &a, float *y, int64_t count) {
  int64_t b = 0;
  for (; b + 4 <= a.count; b += 4)
    add_blocks<kBits, 4>(rows, a.block + b, a.table + b * a.room, a.room, y, count);
  for (; b < a.count; ++b)
    add_blocks<kBits, 1>(rows, a.block + b, a.table + b * a.room, a.room, y, count);
  if (!a.finite) add_poison<kBits>(rows, a, y, least(count, rows.width - rows.from));
}

template <class W>
SNM_INLINE void add_packed_of(const NetOp *op, const W *values, int64_t keep, int64_t step,
                              int64_t first, const float *scale, int64_t from,
                              const ActiveBlocks &a, float *y, int64_t count) {
  const PackedRows<W> rows = {values, op->codes, scale, keep, op->group_outputs, op->code_bytes,
                              step, first, from};
  switch (position_bits(a.of)) {
    case 0: return add_active<0>(rows, a, y, count);
    case 1: return add_active<1>(rows, a, y, count);
    case 2: return add_active<2>(rows, a, y, count);
    case 3: return add_active<3>(rows, a, y, count);
    case 4: return add_active<4>(rows, a, y, count);
    case 5: return add_active<5>(rows, a, y, count);
    default: return add_active<6>(rows, a, y, count);
  }
}

// y[0..count) += the outputs [from, from + count) of a group at one tap.
SNM_INLINE void add_packed(const NetOp *op, int64_t group, int64_t tap, int64_t from,
                           const ActiveBlocks &a, float *y, int64_t count) {
  const int64_t keep = op->word[kLayerKeep], step = op->taps * keep;
  const int64_t first = group * ceil_div(op->inputs, a.of) * step + tap * keep;
  const void *values = op->memory;
  const float *scale = op->scale ? op->scale + group * op->group_stride + from : nullptr;
  switch (op->type) {
    case kF32:
      return add_packed_of(op, static_cast<const float *>(values), keep, step, first, scale, from,
                           a, y, count);
    case kI8:
      return add_packed_of(op, static_cast<const int8_t *>(values), keep, step, first, scale, from,
                           a, y, count);
    case kF16:
      return add_packed_of(op, static_cast<const Half *>(values), keep, step, first, scale, from,
                           a, y, count);
    default:
      return add_packed_of(op, static_cast<const Brain *>(values), keep, step, first, scale, from,
                           a, y, count);
  }
}

}  // namespace
