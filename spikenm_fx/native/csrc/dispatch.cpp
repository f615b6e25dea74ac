// SPDX-License-Identifier: Apache-2.0
// Run-time choice of the ISA level, threads borrowed from torch's OpenMP, per-thread scratch.
#include "abi.h"

#include <cstdlib>
#if defined(SNM_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {
extern const snm_kernels snm_kernels_baseline;
#if defined(SNM_X86)
extern const snm_kernels snm_kernels_v3;
extern const snm_kernels snm_kernels_v4;
#if defined(SNM_AMX)
int32_t snm_amx(const snm_call *);
int32_t snm_amx8(const snm_call *);
#endif
#endif
}

namespace {

typedef void (*gomp_parallel_t)(void (*)(void *), void *, unsigned, unsigned);
gomp_parallel_t gomp_parallel = nullptr;

struct Team {
  int64_t items, next;
  void (*body)(void *, int64_t);
  void *context;
};

void work(void *data) {
  Team *team = static_cast<Team *>(data);
  for (;;) {
    const int64_t item = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    if (item >= team->items) return;
    team->body(team->context, item);
  }
}

constexpr int kSlots = 7;

struct Scratch {
  void *memory[kSlots] = {};
  size_t bytes[kSlots] = {};
  ~Scratch() {
    for (void *m : memory) free(m);
  }
};

thread_local Scratch scratch;

#if defined(SNM_AMX)
snm_kernels with_tiles(snm_kernels kernels) {
  kernels.name = "amx", kernels.amx = snm_amx, kernels.amx8 = snm_amx8;
  return kernels;
}

const snm_kernels kernels_amx = with_tiles(snm_kernels_v4);

// The processor must have the tiles, and Linux must be asked for their state.
bool tiles_allowed() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool supported(int level) {
#if defined(SNM_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (level == 1) return v3;
#if defined(SNM_AMX)
  if (level == 3) return supported(2) && tiles_allowed();
#endif
  if (level == 2)
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512cd");
#endif
  return level == 0;
}

}  // namespace

extern "C" {

// Takes the address of GOMP_parallel in the OpenMP runtime that torch has loaded; null: one thread.
SNM_EXPORT void snm_use_openmp(void *parallel) {
  gomp_parallel = reinterpret_cast<gomp_parallel_t>(parallel);
}

// Kernels of a level (0 baseline, 1 AVX2, 2 AVX-512, 3 AMX), or null if the machine lacks it.
SNM_EXPORT const snm_kernels *snm_level(int32_t level) {
  if (!supported(level)) return nullptr;
#if defined(SNM_X86)
#if defined(SNM_AMX)
  if (level == 3) return &kernels_amx;
#endif
  if (level == 2) return &snm_kernels_v4;
  if (level == 1) return &snm_kernels_v3;
#endif
  return &snm_kernels_baseline;
}

SNM_EXPORT int32_t snm_abi_version() { return 7; }

void snm_parallel(int64_t items, int64_t threads, void (*body)(void *, int64_t), void *context) {
  if (threads > items) threads = items;
  if (threads <= 1 || gomp_parallel == nullptr) {
    for (int64_t i = 0; i < items; ++i) body(context, i);
    return;
  }
  Team team{items, 0, body, context};
  gomp_parallel(work, &team, static_cast<unsigned>(threads), 0);
}

void *snm_scratch(int slot, size_t bytes) {
  if (scratch.bytes[slot] < bytes) {
    free(scratch.memory[slot]);
    bytes = (bytes + 4095) / 4096 * 4096;
    scratch.memory[slot] = aligned_alloc(64, bytes);
    if (scratch.memory[slot] == nullptr) abort();  // a few hundred KiB: nothing sensible is left
    scratch.bytes[slot] = bytes;
  }
  return scratch.memory[slot];
}
}
