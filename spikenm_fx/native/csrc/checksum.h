// SPDX-License-Identifier: Apache-2.0
// A number that changes when memory is written to: a hash in each of 32 lanes, then over them.
// The rotation matters: a product keeps a flipped top bit where it is, and the next flip undoes it,
// so that without it negated values would look unchanged.
#pragma once
#include "simd.h"

namespace {

uint64_t checksum(const void *memory, int64_t bytes) {
  constexpr int kLanes = 32;
  constexpr uint32_t kFactor = 0x9E3779B1u;
  const uint8_t *at = static_cast<const uint8_t *>(memory);
  uint32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i) + 1;
  for (; bytes >= 4 * kLanes; bytes -= 4 * kLanes, at += 4 * kLanes) {
    uint32_t word[kLanes];
    memcpy(word, at, sizeof word);
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t product = (lane[i] ^ word[i]) * kFactor;
      lane[i] = (product << 13) | (product >> 19);
    }
  }
  uint64_t sum = 0xcbf29ce484222325u;
  for (int i = 0; i < kLanes; ++i) sum = (sum ^ lane[i] ^ (lane[i] >> 15)) * 0x100000001b3u;
  for (; bytes > 0; --bytes, ++at) sum = (sum ^ *at) * 0x100000001b3u;
  return sum;
}

}  // namespace
