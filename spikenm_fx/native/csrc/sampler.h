// SPDX-License-Identifier: Apache-2.0
// N of M draws without replacement and their straight-through gradient, in blocks of vectors: one
// block per lane; spikenm_fx/masks/sampler.py has the formulas.
#pragma once
#include "blocks.h"

namespace {

constexpr float LOWEST = -3.40282347e38f;
constexpr uint32_t WEYL = 0x9E3779B9u;  // masks/noise.py explains these
constexpr uint32_t MIX1 = 0x7FEB352Du, MIX2 = 0x846CA68Bu;

SNM_INLINE vw splat_bits(uint32_t x) { return x - vw{}; }

// -log u of the noise's uniform number u, from mixed = WEYL * counter + first half of the key.
SNM_INLINE vf exponential(vw mixed, vw key1) {
  mixed = ((mixed ^ (mixed >> 16)) * splat_bits(MIX1)) ^ key1;
  mixed = (mixed ^ (mixed >> 15)) * splat_bits(MIX2);
  // Of mixed ^ (mixed >> 16) the upper 23 bits, as the fraction of a float in [1, 2); the
  // subtraction of 1 - 2^-24 is exact.
  const vw one_to_two = ((mixed >> 9) ^ (mixed >> 25)) | splat_bits(0x3f800000);
  return minus_log(reinterpret_cast<vf>(one_to_two) - splat(0x1.fffffep-1f));
}

// Finite, the lowest number for NaN.
SNM_INLINE vf finite(vf v) {
  v = v > splat(LOWEST) ? v : splat(LOWEST);
  return v < splat(-LOWEST) ? v : splat(-LOWEST);
}

// |v|; 0 for what is not finite.
SNM_INLINE vf magnitude(vf v) {
  const vf size = as_floats(as_words(v) & splat_word(0x7fffffff));
  return size <= splat(-LOWEST) ? size : vf{};
}

// The numerators of the softmax in place of v, and their sum.
template <int kSize>
SNM_INLINE vf exponentiate(vf *v, int m) {
  vf top = v[0], sum = vf{};
#pragma GCC unroll 16
  for (int j = 1; j < m; ++j) top = v[j] > top ? v[j] : top;
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) {
    v[j] = exp_up_to_88(v[j] - top);
    sum += v[j];
  }
  return sum;
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

// The straight-through gradient: for h = dL/dm of the blocks, dL/dz of the perturbed logits z whose
// ranks are given.  Step by step draws_backward of masks/sampler.py: ratios of successive draws
// instead of exponentials that could overflow.  The result replaces z.
template <int kSize>
SNM_INLINE void straight_through(int m, int64_t draws, float inverse, vf *z, const vi *rank,
                                 const vf *h) {
  const vf inverse_tau = splat(inverse), one = splat(1.0f);
  vf z_at[kSize], h_at[kSize], ratio[kSize], share[kSize];
  for (int64_t k = 0; k < draws; ++k) {
    const vi draw = splat_word(static_cast<int32_t>(k));
    vf z_taken = z[0], h_taken = h[0];
#pragma GCC unroll 16
    for (int j = 1; j < m; ++j) {
      z_taken = rank[j] == draw ? z[j] : z_taken;
      h_taken = rank[j] == draw ? h[j] : h_taken;
    }
    z_at[k] = z_taken;
    h_at[k] = h_taken;
    if (k) ratio[k - 1] = exp_up_to_88((z_taken - z_at[k - 1]) * inverse_tau);
  }
  const vf last = z_at[draws - 1];
  const vi drawn = splat_word(static_cast<int32_t>(draws));
  vf left = vf{}, left_h = vf{};  // of draw k, in units of exp(z_k / tau)
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) {
    const vf y = exp_up_to_88((z[j] - last) * inverse_tau);
    z[j] = rank[j] >= drawn ? y : vf{};  // the logit is no longer needed
    left += z[j];
    left_h = madd(z[j], h[j], left_h);
  }
  for (int64_t k = draws - 1; k >= 0; --k) {
    share[k] = one / (one + left);
    z_at[k] = (h_at[k] + left_h) * share[k];  // the mean of dL/dm that draw k expects
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
    slope += share[k];
    offset = madd(z_at[k], share[k], offset);
    h_at[k] = h_at[k] * share[k] - offset;  // the gradient where draw k went
  }
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) z[j] *= h[j] * slope - offset;
  for (int64_t k = 0; k < draws; ++k) {
    const vi draw = splat_word(static_cast<int32_t>(k));
#pragma GCC unroll 16
    for (int j = 0; j < m; ++j) z[j] = rank[j] == draw ? h_at[k] : z[j];
  }
}

// The same for one or two draws at temperature 1, with one logarithm less for each number: as Gumbel
// noise is -log(-log u), exp(logit + noise) is exp(logit) / -log u, which also has the order of the
// draws.  Logits are taken about their kDraws-largest, so that no draw underflows, and the
// exponential of a larger one ends where its softmax is 1 to the last bit.
//   v: logits, finite; then the gradient.  e: -log u; overwritten.
//   rank: 0 and 1 of the draws in their order, kDraws of all others.
template <int kDraws>
SNM_INLINE void straight_through_at_one(int m, vf *v, vf *e, const vf *h, vi *rank) {
  const vi first = vi{}, second = splat_word(1);
  const vf one = splat(1.0f), none = splat(-1.0f);
  vf top = v[0], next = splat(LOWEST);
#pragma GCC unroll 16
  for (int j = 1; j < m; ++j) {
    const vf lesser = v[j] > top ? top : v[j];
    if (kDraws == 2) next = lesser > next ? lesser : next;
    top = v[j] > top ? v[j] : top;
  }
  const vf about = kDraws == 2 ? next : top, most = splat(60.0f);
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) {
    vf x = v[j] - about;
    if (kDraws == 2) x = x < most ? x : most;
    e[j] = exp_up_to_88(x) / e[j];
  }
  vf best = e[0], h_first = h[0];
  vi winner = vi{};
#pragma GCC unroll 16
  for (int j = 1; j < m; ++j) {
    const vi better = e[j] > best;
    winner = better ? splat_word(j) : winner;
    h_first = better ? h[j] : h_first;
    best = better ? e[j] : best;
  }
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) rank[j] = winner == splat_word(j) ? first : splat_word(kDraws);
  vf last = best, h_second = vf{};
  if constexpr (kDraws == 2) {
    last = none;
#pragma GCC unroll 16
    for (int j = 0; j < m; ++j) {
      const vf left = rank[j] == first ? none : e[j];
      const vi better = left > last;
      winner = better ? splat_word(j) : winner;
      h_second = better ? h[j] : h_second;
      last = better ? left : last;
    }
#pragma GCC unroll 16
    for (int j = 0; j < m; ++j) rank[j] = winner == splat_word(j) ? second : rank[j];
  }
  const vf unit = one / last;
  vf left = vf{}, left_h = vf{};  // of the last draw, in units of exp(z_last)
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) {
    e[j] = rank[j] == splat_word(kDraws) ? e[j] * unit : vf{};
    left += e[j];
    left_h = madd(e[j], h[j], left_h);
  }
  vf slope = one / (one + left);
  vf offset = ((kDraws == 2 ? h_second : h_first) + left_h) * slope * slope;
  vf at_first, at_second = vf{};
  if constexpr (kDraws == 2) {
    const vf ratio = last / best, share = one / madd(one + left, ratio, one);
    const vf offset1 = madd(left_h, ratio, h_first) * share * share;
    at_first = h_first * share - offset1;
    offset = madd(offset1, ratio, offset);
    at_second = h_second * slope - offset;
    slope = madd(share, ratio, slope);
  } else {
    at_first = h_first * slope - offset;
  }
#pragma GCC unroll 16
  for (int j = 0; j < m; ++j) {
    const vf free = e[j] * (h[j] * slope - offset);
    v[j] = rank[j] == first ? at_first : free;
    if (kDraws == 2) v[j] = rank[j] == second ? at_second : v[j];
  }
}

}  // namespace
