// SPDX-License-Identifier: Apache-2.0
// Logarithm and exponential of whole vectors, without branches or calls; relative error below 2e-7.
#pragma once
#include "simd.h"

namespace {

SNM_INLINE vi splat_word(int32_t x) { return x - vi{}; }
SNM_INLINE vf as_floats(vi x) { return reinterpret_cast<vf>(x); }
SNM_INLINE vi as_words(vf x) { return reinterpret_cast<vi>(x); }

template <int kCount>
SNM_INLINE vf polynomial(const float (&c)[kCount], vf x) {
  vf y = splat(c[kCount - 1]);
#pragma GCC unroll 16
  for (int i = kCount - 2; i >= 0; --i) y = madd(y, x, splat(c[i]));
  return y;
}

// -log(x) of positive normal numbers.  x = 2^e (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2);
// log(1 + f) = f - f^2 R(f), R a minimax fit (1.6e-7, times f in the result) of our own.
SNM_INLINE vf minus_log(vf x) {
  static constexpr float R[] = {0.49999994f, -0.33333641f, 0.25002059f,  -0.19974458f,
                                0.16562028f, -0.14775027f, 0.14352252f, -0.09226522f};
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const vi shifted = as_words(x) - splat_word(kRootHalf);
  const vf f = as_floats((shifted & splat_word(0x7fffff)) + splat_word(kRootHalf)) - splat(1.0f);
  const vf e = __builtin_convertvector(shifted >> 23, vf);
  return madd(e, splat(-0.693147181f), madd(f * f, polynomial(R, f), -f));
}

// exp(x) for x <= 88; 0 below -87.  x = n ln 2 + r with |r| <= ln(2) / 2, ln 2 in two parts;
// exp(r) = 1 + r + r^2 E(r), E a minimax fit (6.3e-8) of our own.
SNM_INLINE vf exp_up_to_88(vf x) {
  static constexpr float E[] = {0.5f, 0.16666577f, 0.041666374f, 0.0083631752f, 0.0013941110f};
  const vf to_integer = splat(12582912.0f);  // 1.5 * 2^23: the sum is rounded to an integer
  const vf shifted = madd(x, splat(1.44269504f), to_integer);
  const vf n = shifted - to_integer;
  const vf r = madd(n, splat(2.12194440e-4f), madd(n, splat(-0.693359375f), x));
  const vf y = madd(r * r, polynomial(E, r), r) + splat(1.0f);
  // Unsigned, as lanes that are out of range, and dropped below, may wrap around.
  const vw scaled = reinterpret_cast<vw>(y) + (reinterpret_cast<vw>(shifted) << 23);
  return x >= splat(-87.0f) ? reinterpret_cast<vf>(scaled) : vf{};
}

}  // namespace
