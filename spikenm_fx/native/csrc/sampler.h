// SPDX-License-Identifier: Apache-2.0
// N of M mask draws, their straight-through gradient, and how logits move along it;
// spikenm_fx/masks/sampler.py and update.py have the formulas.  Blocks are cut into tiles that stay in L1; in a tile element j of all blocks is a
// plane, one block per lane, so that every layout runs through the same arithmetic and no result
// depends on tiles, threads or neighbours.
#pragma once
#include "elementary.h"
#include "shuffle.h"

#define SNM_MEMBER inline __attribute__((always_inline))

namespace {

typedef int8_t vb __attribute__((vector_size(VW), may_alias));
typedef int8_t vb_any __attribute__((vector_size(VW), aligned(1), may_alias));
typedef int16_t vh __attribute__((vector_size(VW * 2), may_alias));

constexpr int MAX_M = 32;
constexpr int64_t TILE_FLOATS = 2048;  // logits, gradients and weights of a tile: half of L1
constexpr int64_t TILES_PER_ITEM = 16;
constexpr int64_t SLACK = 16;  // rows are copied in pieces of 16 bytes, past their ends
constexpr float LOWEST = -3.40282347e38f;
constexpr uint32_t WEYL = 0x9E3779B9u;  // masks/noise.py explains these
constexpr uint32_t MIX1 = 0x7FEB352Du, MIX2 = 0x846CA68Bu;

SNM_INLINE vw splat_bits(uint32_t x) { return x - vw{}; }

// Standard Gumbel noise from mixed = WEYL * counter + first half of the key.
SNM_INLINE vf gumbel(vw mixed, vw key1) {
  mixed = ((mixed ^ (mixed >> 16)) * splat_bits(MIX1)) ^ key1;
  mixed = (mixed ^ (mixed >> 15)) * splat_bits(MIX2);
  // Of mixed ^ (mixed >> 16) the upper 23 bits, as the fraction of a float in [1, 2); the
  // subtraction of 1 - 2^-24 is exact.
  const vw one_to_two = ((mixed >> 9) ^ (mixed >> 25)) | splat_bits(0x3f800000);
  return minus_log(minus_log(reinterpret_cast<vf>(one_to_two) - splat(0x1.fffffep-1f)));
}

// Columns [0, leads * width) of a tile are the pairs (block row, inner position), planes their M.
struct Tile {
  int64_t lead, leads, inner0, width;
  int64_t columns() const { return leads * width; }
};

struct Tiling {
  int64_t lead, m, inner, capacity, rows, chunks;

  explicit Tiling(const snm_draws *c) : lead(c->lead), m(c->m), inner(c->inner) {
    capacity = TILE_FLOATS / m / VW * VW;
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

// kM > 0: blocks lie side by side (inner == 1) and are turned in registers.
template <int kM>
void gather_planes(const Tiling &tiling, const Tile &t, const float *from, float *planes) {
  from += tiling.offset(t);
  if constexpr (kM > 0) {
    vf tuples[kM], turned[kM];
    for (int64_t c = 0; c < t.leads; c += VW) {
      const int64_t there = (t.leads - c) * kM;
      alignas(64) float part[kM * VW] = {};
      const float *source = from + c * kM;
      if (there < kM * VW) {
        memcpy(part, source, sizeof(float) * there);
        source = part;
      }
      for (int j = 0; j < kM; ++j) tuples[j] = loadu(source + j * VW);
      unzip<kM>(tuples, turned);
      for (int j = 0; j < kM; ++j) store(planes + j * tiling.stride() + c, turned[j]);
    }
  } else {
    each_row(tiling, t, [=](int64_t at, int64_t column, int64_t n, int64_t room) {
      copy_row(from + at, planes + column, n, room);
    });
  }
}

template <int kM>
void scatter_planes(const Tiling &tiling, const Tile &t, const float *planes, float *to) {
  to += tiling.offset(t);
  if constexpr (kM > 0) {
    vf tuples[kM], turned[kM];
    for (int64_t c = 0; c < t.leads; c += VW) {
      for (int j = 0; j < kM; ++j) turned[j] = load(planes + j * tiling.stride() + c);
      zip<kM>(turned, tuples);
      const int64_t there = (t.leads - c) * kM;
      if (there >= kM * VW) {
        for (int j = 0; j < kM; ++j) storeu(to + c * kM + j * VW, tuples[j]);
      } else {
        memcpy(to + c * kM, tuples, sizeof(float) * there);
      }
    }
  } else {
    each_row(tiling, t, [=](int64_t at, int64_t column, int64_t n, int64_t room) {
      copy_row(planes + column, to + at, n, room);
    });
  }
}

// rank[j]: how many of its block beat plane j; the larger wins, on ties the first.  Where one draw
// is made, all that lost may share the rank 1.
template <int kM>
SNM_INLINE void rank_planes(const vf *z, int m, int64_t keep, vi *rank) {
  if (keep == 1) {
    vf best = z[0];
    vi winner = vi{};
#pragma GCC unroll 16
    for (int j = 1; j < m; ++j) {
      winner = z[j] > best ? splat_word(j) : winner;
      best = z[j] > best ? z[j] : best;
    }
#pragma GCC unroll 16
    for (int j = 0; j < m; ++j) rank[j] = winner == splat_word(j) ? vi{} : splat_word(1);
    return;
  }
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) rank[j] = splat_word(m - 1 - j);  // as if every later one won
#pragma GCC unroll 16
  for (int i = 0; i < m; ++i)
#pragma GCC unroll 16
    for (int j = i + 1; j < m; ++j) {
      const vi first_wins = z[i] >= z[j];  // -1 where true
      rank[i] += first_wins;
      rank[j] -= first_wins;
    }
}

// Draws of one call.  kM: the compiled block length, 0 for any; kTurn: blocks lie side by side.
template <int kM, bool kTurn>
struct Draws {
  static constexpr int kSize = kM ? kM : MAX_M, kLayout = kTurn ? kM : 0;
  const snm_draws *call;
  Tiling tiling;
  uint32_t *steps;  // WEYL times the counter of each column, from the tile's first one

  explicit Draws(const snm_draws *c) : call(c), tiling(c), steps(nullptr) {}

  // Known to the compiler where it is compiled in, so that loops unroll.
  SNM_MEMBER int block() const { return kM ? kM : static_cast<int>(tiling.m); }

  int32_t start() {
    steps = static_cast<uint32_t *>(snm_scratch(0, sizeof(uint32_t) * tiling.capacity));
    const int64_t width = least(tiling.inner, tiling.capacity);
    for (int64_t c = 0; c < tiling.capacity; ++c)
      steps[c] = WEYL * static_cast<uint32_t>(c / width * block() * tiling.inner + c % width);
    snm_parallel(ceil_div(tiling.count(), TILES_PER_ITEM), call->threads, item, this);
    return 0;
  }

  static void item(void *self, int64_t index) {
    const Draws *draws = static_cast<const Draws *>(self);
    const int64_t end = least((index + 1) * TILES_PER_ITEM, draws->tiling.count());
    double sum = 0;
    for (int64_t i = index * TILES_PER_ITEM; i < end; ++i) sum += draws->run(draws->tiling[i]);
    if (draws->call->sums) draws->call->sums[index] = sum;
  }

  double run(const Tile &t) const {
    const int64_t planes = block() * tiling.stride();
    float *x = static_cast<float *>(snm_scratch(1, planes * (5 * sizeof(float) + 2)));
    float *h = x + planes, *weight = h + planes, *credit = weight + planes;
    float *momentum = credit + planes;
    int8_t *present = reinterpret_cast<int8_t *>(momentum + planes), *mask = present + planes;
    gather_planes<kLayout>(tiling, t, call->scores, x);
    if (call->mode == SNM_SPREAD) return spread(t, x);
    if (call->present) gather_present(t, present);
    if (call->weight) gather_planes<kLayout>(tiling, t, call->weight, weight);
    const float *w = call->weight ? weight : nullptr;
    if (call->mode == SNM_MASK) {
      choose(t, x, w, call->present ? present : nullptr, mask);
      return 0;
    }
    gather_planes<kLayout>(tiling, t, call->grad, h);
    if (call->mode == SNM_MOVE) {
      if (call->credit) gather_planes<kLayout>(tiling, t, call->credit, credit);
      gather_planes<kLayout>(tiling, t, call->momentum, momentum);
      for (int64_t c = 0; c < t.columns(); c += VW)
        move(c, x, h, w, call->credit ? credit : nullptr, momentum);
      scatter_planes<kLayout>(tiling, t, x, call->scores);
      scatter_planes<kLayout>(tiling, t, momentum, call->momentum);
      return spread(t, x);
    }
    for (int64_t c = 0; c < t.columns(); c += VW)
      gradient(t, c, x, h, w, call->present ? present : nullptr);
    scatter_planes<kLayout>(tiling, t, x, call->out);
    if (call->mode != SNM_LEARN) return 0;
    if (call->decay != 0) scatter_planes<kLayout>(tiling, t, h, call->grad);
    double squares = 0;
    for (int j = 0; j < block(); ++j)
      squares += sum_of(t, [=](int64_t c) {
        const vf v = load(x + j * tiling.stride() + c);
        return v * v;
      });
    return squares;
  }

  // Over the columns of a tile, without what the last vector holds beyond them.
  template <class Term>
  SNM_MEMBER double sum_of(const Tile &t, Term term) const {
    const int64_t columns = t.columns(), whole = columns / VW * VW;
    vf sum = vf{};
    for (int64_t c = 0; c < whole; c += VW) sum += term(c);
    double total = 0;
    for (int l = 0; l < VW; ++l) total += sum[l];
    if (whole < columns) {
      const vf last = term(whole);
      for (int64_t l = 0; l < columns - whole; ++l) total += last[l];
    }
    return total;
  }

  // Squares of the scores about the means of their blocks.
  double spread(const Tile &t, const float *x) const {
    const vf share = splat(1.0f / block());
    return sum_of(t, [=](int64_t c) {
      vf mean = vf{}, squares = vf{};
      for (int j = 0; j < block(); ++j) mean += load(x + j * tiling.stride() + c);
      mean *= share;
      for (int j = 0; j < block(); ++j) {
        const vf d = load(x + j * tiling.stride() + c) - mean;
        squares = madd(d, d, squares);
      }
      return squares;
    });
  }

  // prior / mean |w| of a block; 0 for blocks of zeros.
  SNM_MEMBER vf prior_factor(int64_t c, const float *w) const {
    vf sum = vf{};
    for (int j = 0; j < block(); ++j) sum += magnitude(load(w + j * tiling.stride() + c));
    const vf factor = splat(1.0f) / (sum * splat(1.0f / block()));
    const vi usable = (sum > vf{}) & (factor > vf{}) & (factor <= splat(-LOWEST));
    return usable ? factor * splat(call->prior) : vf{};
  }

  // |v|; 0 for what is not finite.
  static SNM_MEMBER vf magnitude(vf v) {
    const vf size = as_floats(as_words(v) & splat_word(0x7fffffff));
    return size <= splat(-LOWEST) ? size : vf{};
  }

  // Logits move by the sign of momentum and gradient, in which the targets of EID pull as well.
  SNM_MEMBER void move(int64_t c, float *x, const float *h, const float *w, const float *credit,
                       float *momentum) const {
    vf p[kSize], q[kSize];
    const vf factor = w && call->prior != 0 ? prior_factor(c, w) : vf{};
    const vf kappa = splat(call->kappa);
    if (call->strength != 0) {
      vf total = vf{};
      for (int j = 0; j < block(); ++j) {
        const int64_t at = j * tiling.stride() + c;
        const vf size = w ? magnitude(load(w + at)) : vf{};
        p[j] = kappa * madd(size, factor, load(x + at));
        q[j] = credit ? load(credit + at) : splat(1.0f);
        if (call->credit_by_weight) q[j] *= size;
        total += q[j];
      }
      const vf mean = total * splat(1.0f / block());
      const vf scale = splat(call->inverse_temperature) / (mean == vf{} ? splat(1.0f) : mean);
      for (int j = 0; j < block(); ++j) q[j] *= scale;
      softmax(p);
      softmax(q);
    }
    const vf rate = splat(call->rate), inverse = splat(call->inverse_size);
    const vf strength = splat(call->strength), zero = vf{};
    const vf look = splat(call->look), rest = splat(1.0f - call->look);
    const vf kept = splat(call->keep_momentum), fresh = splat(1.0f - call->keep_momentum);
    for (int j = 0; j < block(); ++j) {
      const int64_t at = j * tiling.stride() + c;
      vf g = load(h + at) * inverse;
      if (call->strength != 0) g = madd(strength, p[j] - q[j], g);
      const vf m = load(momentum + at), ahead = madd(look, m, rest * g);
      const vf step = ahead > zero ? rate : (ahead < zero ? -rate : zero);
      store(x + at, load(x + at) - step);
      store(momentum + at, madd(kept, m, fresh * g));
    }
  }

  SNM_MEMBER void softmax(vf *v) const {
    vf top = v[0], sum = vf{};
    for (int j = 1; j < block(); ++j) top = v[j] > top ? v[j] : top;
    for (int j = 0; j < block(); ++j) {
      v[j] = exp_up_to_88(v[j] - top);
      sum += v[j];
    }
    const vf inverse = splat(1.0f) / sum;
    for (int j = 0; j < block(); ++j) v[j] *= inverse;
  }

  void gather_present(const Tile &t, int8_t *present) const {
    for (int64_t l = 0; l < t.leads; ++l)
      for (int64_t j = 0; j < block(); ++j)
        memset(present + j * tiling.stride() + l * t.width, call->present[(t.lead + l) * block() + j],
               t.width);
  }

  // Finite numbers, the lowest for NaN and for what is absent.
  SNM_MEMBER void perturb(const Tile &t, int64_t c, const float *x, const float *w,
                          const int8_t *present, vf *z) const {
    const bool with_prior = w && call->prior != 0;
    const vf factor = with_prior ? prior_factor(c, w) : vf{};
    const vw key1 = splat_bits(call->key1), step = *reinterpret_cast<const vw *>(steps + c);
    const vf kappa = splat(call->kappa), lowest = splat(LOWEST);
    uint32_t start = WEYL * static_cast<uint32_t>(tiling.offset(t)) + call->key0;
    const bool noisy = call->noisy;
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j, start += WEYL * static_cast<uint32_t>(tiling.inner)) {
      vf v = load(x + j * tiling.stride() + c);
      if (with_prior) v = madd(magnitude(load(w + j * tiling.stride() + c)), factor, v);
      if (noisy) v = madd(kappa, v, gumbel(step + splat_bits(start), key1));
      v = v > lowest ? v : lowest;
      v = v < -lowest ? v : -lowest;
      if (present) {
        const vb there = *reinterpret_cast<const vb_any *>(present + j * tiling.stride() + c);
        v = __builtin_convertvector(there, vi) != vi{} ? v : lowest;
      }
      z[j] = v;
    }
  }

  void choose(const Tile &t, const float *x, const float *w, const int8_t *present,
              int8_t *mask) const {
    const vi keep = splat_word(static_cast<int32_t>(call->keep));
    uint8_t *out = call->mask + tiling.offset(t);
    for (int64_t c = 0; c < t.columns(); c += VW) {
      vf z[kSize];
      vi rank[kSize];
      perturb(t, c, x, w, present, z);
      rank_planes<kM>(z, block(), call->keep, rank);
      if constexpr (kTurn) {
        store_blocks(rank, keep, out + c * kM, t.leads - c);
      } else {
        for (int j = 0; j < block(); ++j) {
          const int64_t at = j * tiling.stride() + c;
          vb kept = __builtin_convertvector((rank[j] < keep) & 1, vb);
          if (present) kept &= *reinterpret_cast<const vb_any *>(present + at);
          *reinterpret_cast<vb_any *>(mask + at) = kept;
        }
      }
    }
    if constexpr (!kTurn) {
      int8_t *to = reinterpret_cast<int8_t *>(out);
      each_row(tiling, t, [=](int64_t at, int64_t column, int64_t n, int64_t room) {
        copy_row(mask + column, to + at, n, room);
      });
    }
  }

  // Bytes of VW blocks side by side: up to four of a block share a (little-endian) word.
  SNM_MEMBER void store_blocks(const vi *rank, vi keep, uint8_t *out, int64_t blocks) const {
    constexpr int kWords = kM < 4 ? 1 : kM / 4;
    vi words[kWords] = {}, tuples[kWords];
#pragma GCC unroll 16
    for (int j = 0; j < kM; ++j)
      words[j / 4] |= (rank[j] < keep) & splat_word(1 << 8 * (j % 4));
    zip<kWords>(words, tuples);
    if constexpr (kM == 2) {
      const vh half = __builtin_convertvector(tuples[0], vh);
      memcpy(out, &half, blocks >= VW ? sizeof half : 2 * blocks);
    } else if (blocks >= VW) {
      memcpy(out, tuples, kM * VW);
    } else {
      memcpy(out, tuples, kM * blocks);
    }
  }

  // One vector of blocks; the gradient replaces the logits in x.  Step by step draws_backward of
  // masks/sampler.py: ratios of successive draws instead of exponentials that could overflow.
  SNM_MEMBER void gradient(const Tile &t, int64_t c, float *x, float *h, const float *weight,
                           const int8_t *present) const {
    const int64_t draws = call->keep;
    const vf inverse_tau = splat(call->inverse_tau), one = splat(1.0f);
    vf z[kSize], dl_dm[kSize], z_at[kSize], h_at[kSize], ratio[kSize], inverse[kSize];
    vi rank[kSize];
    perturb(t, c, x, weight, present, z);
    rank_planes<kM>(z, block(), draws, rank);
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) {
      dl_dm[j] = load(h + j * tiling.stride() + c);
      if (weight) dl_dm[j] *= load(weight + j * tiling.stride() + c);
    }
    for (int64_t k = 0; k < draws; ++k) {
      const vi draw = splat_word(static_cast<int32_t>(k));
      vf z_taken = z[0], h_taken = dl_dm[0];
#pragma GCC unroll 16
      for (int j = 1; j < block(); ++j) {
        z_taken = rank[j] == draw ? z[j] : z_taken;
        h_taken = rank[j] == draw ? dl_dm[j] : h_taken;
      }
      z_at[k] = z_taken;
      h_at[k] = h_taken;
      if (k) ratio[k - 1] = exp_up_to_88((z_taken - z_at[k - 1]) * inverse_tau);
    }
    const vf last = z_at[draws - 1];
    const vi drawn = splat_word(static_cast<int32_t>(draws));
    if (call->mode == SNM_LEARN && call->decay != 0) {
      const vf decay = splat(call->decay);
      for (int j = 0; j < block(); ++j) {
        const int64_t at = j * tiling.stride() + c;
        const vf pulled = madd(decay, load(weight + at), load(h + at));
        store(h + at, rank[j] >= drawn ? pulled : load(h + at));
      }
    }
    vf left = vf{}, left_h = vf{};  // of draw k, in units of exp(z_k / tau)
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) {
      const vf y = exp_up_to_88((z[j] - last) * inverse_tau);
      z[j] = rank[j] >= drawn ? y : vf{};  // the logit is no longer needed
      left += z[j];
      left_h = madd(z[j], dl_dm[j], left_h);
    }
    for (int64_t k = draws - 1; k >= 0; --k) {
      inverse[k] = one / (one + left);
      z_at[k] = (h_at[k] + left_h) * inverse[k];  // the mean of dL/dm that draw k expects
      if (k == 0) break;
      left = (one + left) * ratio[k - 1];
      left_h *= ratio[k - 1];
    }
    vf slope = vf{}, offset = vf{};
    for (int64_t k = 0; k < draws; ++k) {
      if (k) {
        slope *= ratio[k - 1];
        offset *= ratio[k - 1];
      }
      slope += inverse[k];
      offset = madd(z_at[k], inverse[k], offset);
      h_at[k] = h_at[k] * inverse[k] - offset;  // the gradient where draw k went
    }
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) z[j] *= dl_dm[j] * slope - offset;
    for (int64_t k = 0; k < draws; ++k) {
      const vi draw = splat_word(static_cast<int32_t>(k));
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) z[j] = rank[j] == draw ? h_at[k] : z[j];
    }
    const vf gain = splat(call->gain);
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) store(x + j * tiling.stride() + c, z[j] * gain);
  }
};

template <int kM>
int32_t draws_of(const snm_draws *call) {
  if (kM > 0 && call->inner == 1 && call->present == nullptr)
    return Draws<kM, (kM > 0)>(call).start();
  return Draws<kM, false>(call).start();
}

int64_t items(const snm_draws *call) {
  return ceil_div(Tiling(call).count(), TILES_PER_ITEM);
}

int32_t draws(const snm_draws *call) {
  if (call->m < 1 || call->m > MAX_M || call->keep < 1 || call->keep > call->m) return -1;
  if (call->lead == 0 || call->inner == 0) return 0;
  switch (call->m) {
    case 2: return draws_of<2>(call);
    case 4: return draws_of<4>(call);
    case 8: return draws_of<8>(call);
    case 16: return draws_of<16>(call);
    default: return draws_of<0>(call);
  }
}

}  // namespace
