// SPDX-License-Identifier: Apache-2.0
// The blocks [lead][M][inner] of one weight as vectors: element j of VW blocks at a time, whatever
// their layout.  Blocks that lie side by side (inner == 1) are turned in registers on their way
// from and to memory; others are cut into tiles that stay in L1, where element j of all blocks of a
// tile is a plane.  Either way one block is one lane, so that every layout runs through the same
// arithmetic and no result depends on tiles, threads or neighbours.
#pragma once
#include "elementary.h"
#include "shuffle.h"

#define SNM_MEMBER inline __attribute__((always_inline))

namespace {

typedef int8_t vb __attribute__((vector_size(VW), may_alias));
typedef int8_t vb_any __attribute__((vector_size(VW), aligned(1), may_alias));

constexpr int MAX_M = 32;
constexpr int64_t TILE_FLOATS = 1024;  // of one field: five of them stay in L1
constexpr int64_t TILES_PER_ITEM = 32;
constexpr int64_t SLACK = 16;  // rows are copied in pieces of 16 bytes, past their ends

// Columns [0, leads * width) of a tile are the pairs (block row, inner position), planes their M.
struct Tile {
  int64_t lead, leads, inner0, width;
  int64_t columns() const { return leads * width; }
};

struct Tiling {
  int64_t lead, m, inner, capacity, rows, chunks;

  explicit Tiling(const snm_draws *c) : lead(c->lead), m(c->m), inner(c->inner) {
    capacity = most(TILE_FLOATS / m / VW, 1) * VW;
    rows = most(1, capacity / inner);
    chunks = ceil_div(inner, capacity);
  }
  int64_t count() const { return ceil_div(lead, rows) * chunks; }
  int64_t stride() const { return capacity + SLACK; }
  bool whole(const Tile &t) const { return t.width == inner; }
  int64_t offset(const Tile &t) const { return t.lead * m * inner + t.inner0; }
  Tile operator[](int64_t i) const {
    const int64_t first = i / chunks * rows, inner0 = i % chunks * capacity;
    return {first, least(rows, lead - first), inner0, least(capacity, inner - inner0)};
  }
};

// n elements in pieces of 16 bytes; up to room elements may be touched on either side.
template <class T>
SNM_INLINE void copy_row(const T *from, T *to, int64_t n, int64_t room) {
  constexpr int64_t piece = 16 / sizeof(T);
  if (n == 1) {  // overlapping pieces would wait for each other
    *to = *from;
    return;
  }
  for (int64_t i = 0; i < n; i += piece) {
    if (i + piece <= room) {
      memcpy(to + i, from + i, 16);
    } else {
      for (int64_t k = i; k < n; ++k) to[k] = from[k];
    }
  }
}

// Calls row(memory offset from the tile's start, column, n, room) for every row of every plane, in
// the order of memory: what a piece writes too much, the next row puts right.
template <class Row>
SNM_INLINE void each_row(const Tiling &tiling, const Tile &t, Row row) {
  const int64_t end = t.leads * tiling.m * tiling.inner;
  for (int64_t l = 0, at = 0; l < t.leads; ++l)
    for (int64_t j = 0; j < tiling.m; ++j, at += tiling.inner)
      row(at, j * tiling.stride() + l * t.width, t.width,
          tiling.whole(t) ? end - at : t.width);
}

// Of a last vector that is not whole: n elements, then zeros up to `room`.
__attribute__((noinline, cold, unused)) void copy_part(const float *from, float *to, int64_t n,
                                                       int64_t room) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  for (int64_t i = n; i < room; ++i) to[i] = 0;
}

template <int... kLane>
SNM_INLINE vi counted(std::integer_sequence<int, kLane...>) {
  return vi{kLane...};
}
SNM_INLINE vi lane_number() { return counted(lane_numbers()); }

// A field of the blocks of one tile: its memory, and where blocks are not turned its planes.
struct Field {
  float *memory, *planes;
};

// kM: the compiled block length, 0 for any; kTurn: blocks lie side by side.
template <int kM, bool kTurn>
struct Blocks {
  static constexpr int kSize = kM ? kM : MAX_M;
  Tiling tiling;

  explicit Blocks(const snm_draws *c) : tiling(c) {}

  // Known to the compiler where it is compiled in, so that loops unroll.
  SNM_MEMBER int block() const { return kM ? kM : static_cast<int>(tiling.m); }
  int64_t plane_floats() const { return kTurn ? 0 : block() * tiling.stride(); }

  // A field of a tile; `planes` has room for plane_floats().  One without memory stays empty.
  SNM_MEMBER Field open(const Tile &t, const float *memory, float *planes) const {
    Field field = {memory ? const_cast<float *>(memory) + tiling.offset(t) : nullptr, planes};
    return field;
  }

  void gather(const Tile &t, const Field &field) const {
    if constexpr (!kTurn)
      each_row(tiling, t, [=](int64_t at, int64_t column, int64_t n, int64_t room) {
        copy_row(field.memory + at, field.planes + column, n, room);
      });
  }

  void scatter(const Tile &t, const Field &field) const {
    if constexpr (!kTurn)
      each_row(tiling, t, [=](int64_t at, int64_t column, int64_t n, int64_t room) {
        copy_row(field.planes + column, field.memory + at, n, room);
      });
  }

  // v[j]: element j of the blocks in columns [c, c + VW).
  SNM_MEMBER void read(const Tile &t, const Field &field, int64_t c, vf *v) const {
    if constexpr (kTurn) {
      const float *source = field.memory + c * kM;
      alignas(64) float part[kM * VW];
      if (t.leads - c < VW) {
        copy_part(source, part, (t.leads - c) * kM, kM * VW);
        source = part;
      }
      load_tuples<kM>(source, v);
    } else {
      for (int j = 0; j < block(); ++j) v[j] = load(field.planes + j * tiling.stride() + c);
    }
  }

  SNM_MEMBER void write(const Tile &t, const Field &field, int64_t c, const vf *v) const {
    if constexpr (kTurn) {
      float *to = field.memory + c * kM;
      alignas(64) float part[kM * VW];
      const bool whole = t.leads - c >= VW;
      store_tuples<kM>(v, whole ? to : part);
      if (!whole) copy_part(part, to, (t.leads - c) * kM, 0);
    } else {
      for (int j = 0; j < block(); ++j) store(field.planes + j * tiling.stride() + c, v[j]);
    }
  }

  // v, but 0 in the lanes beyond the last column of the tile.
  static SNM_MEMBER vf within(const Tile &t, int64_t c, vf v) {
    const vi there = lane_number() < splat_word(static_cast<int32_t>(t.columns() - c));
    return as_floats(as_words(v) & there);
  }
};

SNM_INLINE double sum_of_lanes(vf v) {
  double total = 0;
  for (int l = 0; l < VW; ++l) total += v[l];
  return total;
}

}  // namespace
