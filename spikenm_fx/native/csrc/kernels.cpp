// SPDX-License-Identifier: Apache-2.0
// All kernels of one ISA level; compiled once per level with SNM_TABLE naming the result.
#include "event.h"
#include "fma.h"
#include "lut.h"
#include "spikes.h"
#ifdef SNM_RUNTIME  // a program of weights that are what they are learns nothing
#define SNM_LEARNING(kernel) nullptr
#else
#include "checksum.h"
#include "passes.h"
#include "permute.h"
#define SNM_LEARNING(kernel) kernel
#endif

namespace {

int32_t no_tiles(const snm_call *) { return -1; }  // amx.cpp has them

}  // namespace

extern "C" int32_t SNM_NET_RUN(const NetRun *);

extern "C" const snm_kernels SNM_TABLE = {
    SNM_NAME, lut, fma, event, event8, no_tiles, no_tiles, integrate, pack_rows, pack_planes,
    unpack_rows, unpack_planes,
    SNM_LEARNING(draws), SNM_LEARNING(items), SNM_LEARNING(kept), SNM_LEARNING(decay),
    SNM_LEARNING(checksum), SNM_LEARNING(permute), SNM_NET_RUN,
};
