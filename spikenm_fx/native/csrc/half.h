// SPDX-License-Identifier: Apache-2.0
// Floats of 16 bits, one at a time.
#pragma once
#include <cstdint>
#include <cstring>

static inline float from_brain(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31;
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) |
                  static_cast<uint32_t>(h & 0x3ff) << 13;
  float x;
  if (exponent == 0) {  // subnormal: a multiple of 2^-24
    x = static_cast<float>(h & 0x3ff) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  memcpy(&x, &bits, 4);
  return x;
}
