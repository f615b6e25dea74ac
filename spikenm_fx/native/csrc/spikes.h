// SPDX-License-Identifier: Apache-2.0
// fp32 spikes to bits and back.  Bits lie as [row][group][word]: one row per pixel, 64 channels a
// word, bit 0 first; bits beyond the last channel of a group are zero.
#pragma once
#include "simd.h"

namespace {

// Bits of n <= 64 floats at p, `stride` 1; clears *binary when a value is neither 0 nor 1.
SNM_INLINE uint64_t word_of(const float *p, int64_t n, bool *binary) {
  uint64_t word = 0;
  vi odd = {};
  int64_t i = 0;
  for (; i + VW <= n; i += VW) {
    const vf x = loadu(p + i);
    const vi one = reinterpret_cast<vi>(x == splat(1.0f));
    odd |= ~(one | reinterpret_cast<vi>(x == vf{}));
    word |= static_cast<uint64_t>(lanes(one)) << i;
  }
  if (lanes(odd)) *binary = false;
  for (; i < n; ++i) {
    if (p[i] == 1.0f)
      word |= 1ull << i;
    else if (!(p[i] == 0.0f))
      *binary = false;
  }
  return word;
}

struct Packing {
  const float *x;
  uint64_t *bits;
  float *out;
  int64_t rows, groups, cg, pixels, images;
  int32_t binary;

  int64_t words() const { return ceil_div(cg, 64); }

  void not_binary() { __atomic_store_n(&binary, 0, __ATOMIC_RELAXED); }
};

constexpr int64_t kRowsPerItem = 256;

void pack_rows_item(void *context, int64_t item) {
  Packing *p = static_cast<Packing *>(context);
  const int64_t words = p->words();
  bool binary = true;
  for (int64_t r = item * kRowsPerItem; r < least(p->rows, (item + 1) * kRowsPerItem); ++r)
    for (int64_t g = 0; g < p->groups; ++g)
      for (int64_t w = 0; w < words; ++w)
        p->bits[(r * p->groups + g) * words + w] =
            word_of(p->x + (r * p->groups + g) * p->cg + w * 64, least(64, p->cg - w * 64),
                    &binary);
  if (!binary) p->not_binary();
}

int32_t pack_rows(const float *x, int64_t rows, int64_t groups, int64_t cg, uint64_t *bits,
                  int64_t threads) {
  Packing p = {x, bits, nullptr, rows, groups, cg, 0, 0, 1};
  snm_parallel(ceil_div(rows, kRowsPerItem), threads, pack_rows_item, &p);
  return p.binary;
}

// One item: 64 channels (or fewer) x 64 pixels of an image, by a 64x64 bit transpose.
template <class Visit>
SNM_INLINE void plane_item(const Packing *p, int64_t item, Visit visit) {
  const int64_t blocks = ceil_div(p->pixels, 64), words = p->words();
  const int64_t block = item % blocks, image = item / blocks;
  for (int64_t g = 0; g < p->groups; ++g)
    for (int64_t w = 0; w < words; ++w)
      visit(image, block * 64, g, w, least(64, p->pixels - block * 64),
            least(64, p->cg - w * 64));
}

void pack_planes_item(void *context, int64_t item) {
  Packing *p = static_cast<Packing *>(context);
  bool binary = true;
  plane_item(p, item, [&](int64_t image, int64_t p0, int64_t g, int64_t w, int64_t n, int64_t c) {
    alignas(64) uint64_t matrix[64] = {};
    const float *x =
        p->x + ((image * p->groups + g) * p->cg + w * 64) * p->pixels + p0;
    for (int64_t i = 0; i < c; ++i) matrix[i] = word_of(x + i * p->pixels, n, &binary);
    transpose_bits(matrix);
    uint64_t *out = p->bits + ((image * p->pixels + p0) * p->groups + g) * p->words() + w;
    for (int64_t i = 0; i < n; ++i) out[i * p->groups * p->words()] = matrix[i];
  });
  if (!binary) p->not_binary();
}

int32_t pack_planes(const float *x, int64_t images, int64_t groups, int64_t cg, int64_t pixels,
                    uint64_t *bits, int64_t threads) {
  Packing p = {x, bits, nullptr, 0, groups, cg, pixels, images, 1};
  snm_parallel(images * ceil_div(pixels, 64), threads, pack_planes_item, &p);
  return p.binary;
}

SNM_INLINE void spread(uint64_t word, int64_t n, float *out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>((word >> i) & 1);
}

void unpack_rows_item(void *context, int64_t item) {
  const Packing *p = static_cast<const Packing *>(context);
  const int64_t words = p->words();
  for (int64_t r = item * kRowsPerItem; r < least(p->rows, (item + 1) * kRowsPerItem); ++r)
    for (int64_t g = 0; g < p->groups; ++g)
      for (int64_t w = 0; w < words; ++w)
        spread(p->bits[(r * p->groups + g) * words + w], least(64, p->cg - w * 64),
               p->out + (r * p->groups + g) * p->cg + w * 64);
}

void unpack_rows(const uint64_t *bits, int64_t rows, int64_t groups, int64_t cg, float *x,
                 int64_t threads) {
  Packing p = {nullptr, const_cast<uint64_t *>(bits), x, rows, groups, cg, 0, 0, 1};
  snm_parallel(ceil_div(rows, kRowsPerItem), threads, unpack_rows_item, &p);
}

void unpack_planes_item(void *context, int64_t item) {
  const Packing *p = static_cast<const Packing *>(context);
  plane_item(p, item, [&](int64_t image, int64_t p0, int64_t g, int64_t w, int64_t n, int64_t c) {
    alignas(64) uint64_t matrix[64] = {};
    const uint64_t *in = p->bits + ((image * p->pixels + p0) * p->groups + g) * p->words() + w;
    for (int64_t i = 0; i < n; ++i) matrix[i] = in[i * p->groups * p->words()];
    transpose_bits(matrix);
    float *x = p->out + ((image * p->groups + g) * p->cg + w * 64) * p->pixels + p0;
    for (int64_t i = 0; i < c; ++i) spread(matrix[i], n, x + i * p->pixels);
  });
}

void unpack_planes(const uint64_t *bits, int64_t images, int64_t groups, int64_t cg,
                   int64_t pixels, float *x, int64_t threads) {
  Packing p = {nullptr, const_cast<uint64_t *>(bits), x, 0, groups, cg, pixels, images, 1};
  snm_parallel(images * ceil_div(pixels, 64), threads, unpack_planes_item, &p);
}

}  // namespace
