// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4): the checksum of a network's file, where no library may be needed to read it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(SNM_X86)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace {

// The fractional parts of the cube roots of the first 64 primes.
const uint32_t kSha[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
    0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
    0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
    0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
    0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
    0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
    0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
    0xc67178f2};

#if defined(SNM_X86)
// Four rounds at a time, by the processor's own instructions: ten times as fast.
struct ShaInstructions {
  static bool there() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1 &&
           __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("ssse3");
  }

  __attribute__((target("sha,sse4.1,ssse3"))) static void compress(uint32_t *h,
                                                                   const uint8_t *block) {
    const __m128i turned = _mm_set_epi64x(0x0c0d0e0f08090a0bll, 0x0405060700010203ll);
    __m128i m[4];
    for (int i = 0; i < 4; ++i)
      m[i] = _mm_shuffle_epi8(
          _mm_loadu_si128(reinterpret_cast<const __m128i *>(block + 16 * i)), turned);
    __m128i *state = reinterpret_cast<__m128i *>(h);
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(state), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(state + 1), 0x1b);
    const __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
    __m128i s0 = abef, s1 = cdgh;
    for (int i = 0; i < 16; ++i) {
      __m128i &w = m[i & 3];
      const __m128i last = m[(i + 3) & 3];
      if (i >= 4) {
        w = _mm_sha256msg1_epu32(w, m[(i + 1) & 3]);
        w = _mm_add_epi32(w, _mm_alignr_epi8(last, m[(i + 2) & 3], 4));
        w = _mm_sha256msg2_epu32(w, last);
      }
      const __m128i k = _mm_loadu_si128(reinterpret_cast<const __m128i *>(kSha + 4 * i));
      const __m128i x = _mm_add_epi32(w, k);
      s1 = _mm_sha256rnds2_epu32(s1, s0, x);
      s0 = _mm_sha256rnds2_epu32(s0, s1, _mm_shuffle_epi32(x, 0x0e));
    }
    const __m128i feba = _mm_shuffle_epi32(_mm_add_epi32(s0, abef), 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(_mm_add_epi32(s1, cdgh), 0xb1);
    _mm_storeu_si128(state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(state + 1, _mm_alignr_epi8(dchg, feba, 8));
  }
};
#endif

class Sha256 {
 public:
  void add(const void *data, size_t size) {
    const uint8_t *at = static_cast<const uint8_t *>(data);
    total_ += size;
    for (; !held_ && size >= 64; at += 64, size -= 64) compress(at);
    while (size) {
      const size_t n = size < 64 - held_ ? size : 64 - held_;
      memcpy(block_ + held_, at, n);
      held_ += n, at += n, size -= n;
      if (held_ == 64) compress(block_), held_ = 0;
    }
  }

  // 64 hexadecimal digits.
  void finish(char *hex) {
    const uint64_t bits = total_ * 8;
    const uint8_t one = 0x80, zero = 0;
    add(&one, 1);
    while (held_ != 56) add(&zero, 1);
    uint8_t length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    add(length, 8);
    for (int i = 0; i < 64; ++i) hex[i] = "0123456789abcdef"[h_[i / 8] >> (28 - i % 8 * 4) & 15];
  }

 private:
  static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

  void compress(const uint8_t *block) {
#if defined(SNM_X86)
    if (instructions_) return ShaInstructions::compress(h_, block);
#endif
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; ++i)
      w[i] = static_cast<uint32_t>(block[4 * i]) << 24 | block[4 * i + 1] << 16 |
             block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; ++i)
      w[i] = w[i - 16] + w[i - 7] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) +
             (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, h_, sizeof s);
    for (int i = 0; i < 64; ++i) {
      const uint32_t e = turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25);
      const uint32_t a = turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22);
      const uint32_t t = s[7] + e + ((s[4] & s[5]) ^ (~s[4] & s[6])) + kSha[i] + w[i];
      const uint32_t u = a + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      memmove(s + 1, s, 7 * sizeof *s);
      s[4] += t;
      s[0] = t + u;
    }
    for (int i = 0; i < 8; ++i) h_[i] += s[i];
  }

  uint32_t h_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t block_[64];
  size_t held_ = 0;
  uint64_t total_ = 0;
#if defined(SNM_X86)
  const bool instructions_ = ShaInstructions::there();
#endif
};

}  // namespace
