// SPDX-License-Identifier: Apache-2.0
// Passes over the blocks of one weight: masks, gradients of logits, and how logits move along them;
// spikenm_fx/masks/sampler.py, update.py and eid/ have the formulas.
#pragma once
#include "sampler.h"

namespace {

typedef int16_t vh __attribute__((vector_size(VW * 2), may_alias));

// kM: the compiled block length, 0 for any; kTurn: blocks lie side by side.
template <int kM, bool kTurn>
struct Draws : Blocks<kM, kTurn> {
  using Base = Blocks<kM, kTurn>;
  using Base::block;
  using Base::read;
  using Base::tiling;
  using Base::write;
  static constexpr int kSize = Base::kSize;
  const snm_draws *call;
  uint32_t *steps;  // WEYL times the counter of each column, from the tile's first one

  explicit Draws(const snm_draws *c) : Base(c), call(c), steps(nullptr) {}

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

  // What a pass over one tile reads.
  struct Fields {
    Field scores, grad, weight, credit, momentum;
    int8_t *present, *mask;
  };

  double run(const Tile &t) const {
    const int64_t planes = block() * tiling.stride();
    float *room = static_cast<float *>(snm_scratch(1, planes * (5 * sizeof(float) + 2)));
    const auto open = [&](const float *memory, int slot) {
      const Field field = Base::open(t, memory, room + slot * planes);
      if (memory) Base::gather(t, field);
      return field;
    };
    const bool moving = call->mode == SNM_MOVE, choosing = call->mode == SNM_MASK;
    const bool spreading = call->mode == SNM_SPREAD;
    Fields f = {open(call->scores, 0),
                open(choosing || spreading ? nullptr : call->grad, 1),
                open(spreading ? nullptr : call->weight, 2),
                open(moving ? call->credit : nullptr, 3),
                open(moving ? call->momentum : nullptr, 4),
                nullptr,
                nullptr};
    int8_t *bytes = reinterpret_cast<int8_t *>(room + 5 * planes);
    f.mask = bytes + planes;
    if (call->present) gather_present(t, f.present = bytes);
    if (spreading) return spread(t, f);
    if (choosing) {
      choose(t, f);
      return 0;
    }
    if (moving) return move(t, f);
    const bool at_one = call->mode == SNM_LEARN && call->inverse_tau == 1.0f && !call->present;
    if (at_one && call->keep == 1) return learn<1>(t, f);
    if (at_one && call->keep == 2) return learn<2>(t, f);
    return learn<0>(t, f);
  }

  // Logits of VW columns: scores, and the prior of the weights that are read on the way.
  SNM_MEMBER void logits(const Tile &t, const Fields &f, int64_t c, vf *v, vf *w) const {
    read(t, f.scores, c, v);
    if (call->absolute)
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) v[j] = as_floats(as_words(v[j]) & splat_word(0x7fffffff));
    if (!f.weight.memory) return;
    read(t, f.weight, c, w);
    if (call->prior == 0) return;
    const vf factor = prior_factor(w);
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) v[j] = madd(magnitude(w[j]), factor, v[j]);
  }

  // prior / mean |w| of a block; 0 for blocks of zeros.
  SNM_MEMBER vf prior_factor(const vf *w) const {
    vf sum = vf{};
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) sum += magnitude(w[j]);
    const vf factor = splat(1.0f) / (sum * splat(1.0f / block()));
    const vi usable = (sum > vf{}) & (factor > vf{}) & (factor <= splat(-LOWEST));
    return usable ? factor * splat(call->prior) : vf{};
  }

  // -log u of the noise at element j of VW columns, for all j.
  SNM_MEMBER void exponentials(const Tile &t, int64_t c, vf *e) const {
    const vw key1 = splat_bits(call->key1), step = *reinterpret_cast<const vw *>(steps + c);
    uint32_t start = WEYL * static_cast<uint32_t>(tiling.offset(t)) + call->key0;
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j, start += WEYL * static_cast<uint32_t>(tiling.inner))
      e[j] = exponential(step + splat_bits(start), key1);
  }

  // Perturbed logits in place of the logits: finite, the lowest for what is absent.
  SNM_MEMBER void perturb(const Tile &t, const Fields &f, int64_t c, vf *v) const {
    if (call->noisy) {
      const vf kappa = splat(call->kappa);
      vf e[kSize];
      exponentials(t, c, e);
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) v[j] = madd(kappa, v[j], minus_log(e[j]));
    }
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) v[j] = finite(v[j]);
    if (f.present)
      for (int j = 0; j < block(); ++j) {
        const vb there = *reinterpret_cast<const vb_any *>(f.present + j * tiling.stride() + c);
        v[j] = __builtin_convertvector(there, vi) != vi{} ? v[j] : splat(LOWEST);
      }
  }

  void gather_present(const Tile &t, int8_t *present) const {
    for (int64_t l = 0; l < t.leads; ++l)
      for (int64_t j = 0; j < block(); ++j)
        memset(present + j * tiling.stride() + l * t.width, call->present[(t.lead + l) * block() + j],
               t.width);
  }

  void choose(const Tile &t, const Fields &f) const {
    const vi keep = splat_word(static_cast<int32_t>(call->keep));
    uint8_t *out = call->mask + tiling.offset(t);
    for (int64_t c = 0; c < t.columns(); c += VW) {
      vf z[kSize], w[kSize];
      vi rank[kSize];
      logits(t, f, c, z, w);
      perturb(t, f, c, z);
      rank_planes<kM>(z, block(), call->keep, rank);
      if constexpr (kTurn) {
        store_blocks(rank, keep, out + c * kM, t.leads - c);
      } else {
        for (int j = 0; j < block(); ++j) {
          const int64_t at = j * tiling.stride() + c;
          vb kept = __builtin_convertvector((rank[j] < keep) & 1, vb);
          if (f.present) kept &= *reinterpret_cast<const vb_any *>(f.present + at);
          *reinterpret_cast<vb_any *>(f.mask + at) = kept;
        }
      }
    }
    if constexpr (!kTurn) {
      int8_t *to = reinterpret_cast<int8_t *>(out);
      each_row(tiling, t, [=](int64_t at, int64_t column, int64_t n, int64_t room) {
        copy_row(f.mask + column, to + at, n, room);
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

  // The gradient of the logits to `out`, and decay into that of the weights; the sum of squares.
  // kDraws: one or two draws at temperature 1, 0 for any.
  template <int kDraws>
  double learn(const Tile &t, const Fields &f) const {
    // What is written to `out` in planes goes over the scores, which are no longer needed.
    const Field out = {call->out + tiling.offset(t), f.scores.planes};
    const bool decays = call->mode == SNM_LEARN && call->decay != 0;
    const vf gain = splat(call->gain), decay = splat(call->decay), kappa = splat(call->kappa);
    const vi drawn = splat_word(static_cast<int32_t>(call->keep));
    vf squares = vf{};
    for (int64_t c = 0; c < t.columns(); c += VW) {
      vf v[kSize], w[kSize], g[kSize], h[kSize], e[kSize];
      vi rank[kSize];
      logits(t, f, c, v, w);
      read(t, f.grad, c, g);
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) h[j] = f.weight.memory ? g[j] * w[j] : g[j];
      if constexpr (kDraws == 0) {
        perturb(t, f, c, v);
        rank_planes<kM>(v, block(), call->keep, rank);
        straight_through<kSize>(block(), call->keep, call->inverse_tau, v, rank, h);
      } else {
        exponentials(t, c, e);
#pragma GCC unroll 16
        for (int j = 0; j < block(); ++j) v[j] = finite(kappa * v[j]);
        straight_through_at_one<kDraws>(block(), v, e, h, rank);
      }
      vf of_block = vf{};
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) {
        v[j] *= gain;
        of_block = madd(v[j], v[j], of_block);
      }
      squares += Base::within(t, c, of_block);
      write(t, out, c, v);
      if (!decays) continue;
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) g[j] = rank[j] >= drawn ? madd(decay, w[j], g[j]) : g[j];
      write(t, f.grad, c, g);
    }
    Base::scatter(t, out);
    if (decays) Base::scatter(t, f.grad);
    return sum_of_lanes(squares);
  }

  // Logits move by the sign of momentum and gradient, in which the targets of EID pull as well; the
  // sum of squares of the new scores about the means of their blocks.
  double move(const Tile &t, const Fields &f) const {
    const vf rate = splat(call->rate), inverse = splat(call->inverse_size), zero = vf{};
    const vf look = splat(call->look), rest = splat(1.0f - call->look);
    const vf kept = splat(call->keep_momentum), fresh = splat(1.0f - call->keep_momentum);
    vf squares = vf{};
    for (int64_t c = 0; c < t.columns(); c += VW) {
      vf x[kSize], g[kSize], m[kSize];
      read(t, f.scores, c, x);
      read(t, f.grad, c, g);
      read(t, f.momentum, c, m);
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) g[j] *= inverse;
      if (call->strength != 0) pull(t, f, c, x, g);
#pragma GCC unroll 16
      for (int j = 0; j < block(); ++j) {
        const vf ahead = madd(look, m[j], rest * g[j]);
        const vf step = ahead > zero ? rate : (ahead < zero ? -rate : zero);
        x[j] -= step;
        m[j] = madd(kept, m[j], fresh * g[j]);
      }
      write(t, f.scores, c, x);
      write(t, f.momentum, c, m);
      squares += Base::within(t, c, squares_about_mean(x));
    }
    Base::scatter(t, f.scores);
    Base::scatter(t, f.momentum);
    return sum_of_lanes(squares);
  }

  // g += strength * (p - q), probabilities and targets of EID.
  SNM_MEMBER void pull(const Tile &t, const Fields &f, int64_t c, const vf *x, vf *g) const {
    vf p[kSize], q[kSize], w[kSize];
    const vf kappa = splat(call->kappa), strength = splat(call->strength);
    if (f.credit.memory) read(t, f.credit, c, q);
    if (f.weight.memory) read(t, f.weight, c, w);
    const vf factor = f.weight.memory && call->prior != 0 ? prior_factor(w) : vf{};
    vf total = vf{};
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) {
      const vf size = f.weight.memory ? magnitude(w[j]) : vf{};
      p[j] = kappa * madd(size, factor, x[j]);
      if (!f.credit.memory) q[j] = splat(1.0f);
      if (call->credit_by_weight) q[j] *= size;
      total += q[j];
    }
    const vf mean = total * splat(1.0f / block());
    const vf scale = splat(call->inverse_temperature) / (mean == vf{} ? splat(1.0f) : mean);
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) q[j] *= scale;
    const vf of_p = strength / exponentiate<kSize>(p, block());
    const vf of_q = strength / exponentiate<kSize>(q, block());
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) g[j] = madd(p[j], of_p, madd(-q[j], of_q, g[j]));
  }

  double spread(const Tile &t, const Fields &f) const {
    vf squares = vf{};
    for (int64_t c = 0; c < t.columns(); c += VW) {
      vf x[kSize];
      read(t, f.scores, c, x);
      squares += Base::within(t, c, squares_about_mean(x));
    }
    return sum_of_lanes(squares);
  }

  SNM_MEMBER vf squares_about_mean(const vf *x) const {
    vf mean = vf{}, squares = vf{};
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) mean += x[j];
    mean *= splat(1.0f / block());
#pragma GCC unroll 16
    for (int j = 0; j < block(); ++j) squares = madd(x[j] - mean, x[j] - mean, squares);
    return squares;
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

// Elementwise passes over whole memory, in items of kPiece elements.
struct Elements {
  const float *weight;
  const uint8_t *mask;
  float factor, *out;
  int64_t n;
};

constexpr int64_t kPiece = 32768;

SNM_INLINE vi drawn_at(const uint8_t *mask) {
  const vb bytes = *reinterpret_cast<const vb_any *>(mask);
  return __builtin_convertvector(bytes, vi) != vi{};
}

// out = weight where the mask is set, factor times it elsewhere; exactly 0 there for a factor of 0.
void kept_item(void *context, int64_t index) {
  const Elements *e = static_cast<const Elements *>(context);
  const int64_t end = least((index + 1) * kPiece, e->n);
  const vf factor = splat(e->factor);
  int64_t i = index * kPiece;
  if (e->factor == 0) {
    for (; i + VW <= end; i += VW)
      storeu(e->out + i, as_floats(as_words(loadu(e->weight + i)) & drawn_at(e->mask + i)));
  } else {
    for (; i + VW <= end; i += VW) {
      const vf w = loadu(e->weight + i);
      storeu(e->out + i, drawn_at(e->mask + i) ? w : w * factor);
    }
  }
  for (; i < end; ++i)
    e->out[i] = e->mask[i] ? e->weight[i] : (e->factor == 0 ? 0.0f : e->weight[i] * e->factor);
}

// out += factor * weight where the mask is not set.
void decay_item(void *context, int64_t index) {
  const Elements *e = static_cast<const Elements *>(context);
  const int64_t end = least((index + 1) * kPiece, e->n);
  const vf factor = splat(e->factor);
  int64_t i = index * kPiece;
  for (; i + VW <= end; i += VW) {
    const vf g = loadu(e->out + i);
    storeu(e->out + i, drawn_at(e->mask + i) ? g : madd(factor, loadu(e->weight + i), g));
  }
  for (; i < end; ++i)
    if (!e->mask[i]) e->out[i] += e->factor * e->weight[i];
}

void kept(const float *weight, const uint8_t *mask, float undrawn, float *out, int64_t n,
          int64_t threads) {
  Elements all = {weight, mask, undrawn, out, n};
  snm_parallel(ceil_div(n, kPiece), threads, kept_item, &all);
}

void decay(const float *weight, const uint8_t *mask, float factor, float *grad, int64_t n,
           int64_t threads) {
  Elements all = {weight, mask, factor, grad, n};
  snm_parallel(ceil_div(n, kPiece), threads, decay_item, &all);
}

}  // namespace
