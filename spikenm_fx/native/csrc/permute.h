// SPDX-License-Identifier: Apache-2.0
// Which order of columns keeps most under N:M: simulated annealing over swaps of two columns.
// The N largest of a block sum to those of its M - 1 others plus max(0, x - t), where x is the score
// of the column left out and t the N-th largest of the others.  With t kept for each place, the gain
// of a swap is two passes over the rows and no sorting; only accepted swaps sort, in two blocks.
#pragma once
#include "simd.h"

#include <chrono>
#include <cmath>
#include <cstdlib>

namespace {

constexpr int MAX_OF = 64;
constexpr int64_t LOOK_AT_THE_CLOCK = 256;  // proposals
constexpr double NEVER = 30.0;              // exp(-30): not worth a logarithm

// splitmix64, of our own because <random> differs between libraries.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) {  // n < 2^31
    return static_cast<int64_t>((next() >> 32) * static_cast<uint64_t>(n) >> 32);
  }
  double open_unit() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53; }
};

SNM_INLINE float sum_of(vf v) {
  float sum = 0.0f;
  for (int i = 0; i < VW; ++i) sum += v[i];
  return sum;
}

SNM_INLINE vf larger(vf a, vf b) { return select(a > b, a, b); }
SNM_INLINE vf smaller(vf a, vf b) { return select(a > b, b, a); }

// One matrix of scores and, for each place of a column, the threshold t and what the column there
// adds.  Places [0, fixed) and those behind the channels hold columns that never move.
struct Scored {
  const snm_scores *given;
  float *thresholds;  // [columns][stride]
  float *adds;        // [columns]
  int64_t *at;        // column at each place

  const float *column(int64_t place) const { return given->scores + at[place] * given->stride; }
  float *threshold(int64_t place) const { return thresholds + place * given->stride; }
  int64_t block(int64_t place) const { return place / given->of; }

  template <int kKeep>
  void sort_block(int64_t block) const {
    const int keep = kKeep > 0 ? kKeep : static_cast<int>(given->keep);
    const int64_t first = block * given->of;
    const int m = static_cast<int>(least(given->of, given->columns - first));
    vf added[MAX_OF] = {};
    for (int64_t r = 0; r < given->stride; r += VW) {
      vf top[MAX_OF + 1];  // the keep + 1 largest, in descending order
      for (int k = 0; k <= keep; ++k) top[k] = vf{};  // scores are not negative
      for (int j = 0; j < m; ++j) {
        vf x = loadu(column(first + j) + r);
        for (int k = 0; k <= keep; ++k) {
          const vf over = larger(top[k], x);
          x = smaller(top[k], x);
          top[k] = over;
        }
      }
      for (int j = 0; j < m; ++j) {
        const vf x = loadu(column(first + j) + r);
        const vf t = select(x >= top[keep - 1], top[keep], top[keep - 1]);
        storeu(threshold(first + j) + r, t);
        added[j] += larger(x - t, vf{});
      }
    }
    for (int j = 0; j < m; ++j) adds[first + j] = sum_of(added[j]);
  }

  void sort(int64_t block) const {
    switch (given->keep) {
      case 1: return sort_block<1>(block);
      case 2: return sort_block<2>(block);
      case 4: return sort_block<4>(block);
      default: return sort_block<0>(block);
    }
  }

  // What is kept more if the columns at places p and q change places.
  float gain(int64_t p, int64_t q) const {
    if (block(p) == block(q)) return 0.0f;
    const float *x = column(p), *y = column(q), *s = threshold(p), *t = threshold(q);
    vf one{}, two{};
    for (int64_t r = 0; r < given->stride; r += VW) {
      one += larger(loadu(y + r) - loadu(s + r), vf{});
      two += larger(loadu(x + r) - loadu(t + r), vf{});
    }
    return sum_of(one + two) - adds[p] - adds[q];
  }

  void swap(int64_t p, int64_t q) const {
    const int64_t column = at[p];
    at[p] = at[q];
    at[q] = column;
    if (block(p) == block(q)) return sort(block(p));
    sort(block(p));
    sort(block(q));
  }
};

struct Search {
  const snm_permutation *call;
  Scored *parts;
  Random random;
  std::chrono::steady_clock::time_point start;
  int64_t until_the_clock = LOOK_AT_THE_CLOCK;
  bool stopped = false;

  float gain(int64_t i, int64_t j) const {
    float sum = 0.0f;
    for (int64_t k = 0; k < call->n_parts; ++k)
      sum += parts[k].gain(parts[k].given->fixed + i, parts[k].given->fixed + j);
    return sum;
  }

  void swap(int64_t i, int64_t j) {
    for (int64_t k = 0; k < call->n_parts; ++k)
      parts[k].swap(parts[k].given->fixed + i, parts[k].given->fixed + j);
    const int64_t channel = call->order[i];
    call->order[i] = call->order[j];
    call->order[j] = channel;
  }

  // Whether to go on; asks the clock and the caller now and then.
  bool goes_on(double share) {
    if (--until_the_clock > 0) return !stopped;
    until_the_clock = LOOK_AT_THE_CLOCK;
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    stopped = spent.count() > call->seconds || (call->progress && call->progress(share));
    return !stopped;
  }

  double mean_size_of_gains() {
    constexpr int kSamples = 256;
    double sum = 0.0;
    for (int n = 0; n < kSamples; ++n)
      sum += std::fabs(gain(random.below(call->channels), random.below(call->channels)));
    return sum / kSamples;
  }

  void anneal() {
    const double unit = mean_size_of_gains();
    const double cooling = std::log(call->cold / call->hot);
    for (int64_t n = 0; n < call->proposals && unit > 0.0; ++n) {
      const double share = static_cast<double>(n) / static_cast<double>(call->proposals);
      if (!goes_on(share)) return;
      const double heat = unit * call->hot * std::exp(cooling * share);
      const int64_t i = random.below(call->channels), j = random.below(call->channels);
      const double more = gain(i, j);
      if (i == j || more < -NEVER * heat) continue;
      if (more > 0.0 || more > heat * std::log(random.open_unit())) swap(i, j);
    }
  }

  // Only gains, until no swap gains any more.
  void descend() {
    const double least_gain = 1e-6 * mean_size_of_gains();
    int64_t left = call->tries;
    for (bool changed = true; changed;) {
      changed = false;
      for (int64_t i = 0; i < call->channels; ++i)
        for (int64_t j = i + 1; j < call->channels; ++j) {
          if (--left < 0 || !goes_on(1.0)) return;
          if (gain(i, j) > least_gain) {
            swap(i, j);
            changed = true;
          }
        }
    }
  }
};

int32_t permute(const snm_permutation *call) {
  for (int64_t k = 0; k < call->n_parts; ++k) {
    const snm_scores &p = call->parts[k];
    if (p.keep < 1 || p.keep >= p.of || p.of > MAX_OF || p.stride % 16) return -1;
  }
  Scored *parts = static_cast<Scored *>(calloc(call->n_parts + 1, sizeof(Scored)));
  bool enough = parts != nullptr;
  for (int64_t k = 0; enough && k < call->n_parts; ++k) {
    const snm_scores *given = &call->parts[k];
    parts[k] = {given, static_cast<float *>(malloc(sizeof(float) * given->columns * given->stride)),
                static_cast<float *>(malloc(sizeof(float) * given->columns)),
                static_cast<int64_t *>(malloc(sizeof(int64_t) * given->columns))};
    enough = parts[k].thresholds && parts[k].adds && parts[k].at;
  }
  if (enough) {
    for (int64_t k = 0; k < call->n_parts; ++k) {
      const snm_scores *given = parts[k].given;
      for (int64_t c = 0; c < given->columns; ++c) parts[k].at[c] = c;
      for (int64_t i = 0; i < call->channels; ++i)
        parts[k].at[given->fixed + i] = given->fixed + call->order[i];
      for (int64_t b = 0; b * given->of < given->columns; ++b) parts[k].sort(b);
    }
    Search search{call, parts, {call->seed}, std::chrono::steady_clock::now()};
    search.anneal();
    search.descend();
  }
  for (int64_t k = 0; parts && k < call->n_parts; ++k) {
    free(parts[k].thresholds);
    free(parts[k].adds);
    free(parts[k].at);
  }
  free(parts);
  return enough ? 0 : -2;
}

}  // namespace
