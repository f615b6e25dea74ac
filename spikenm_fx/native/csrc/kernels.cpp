// SPDX-License-Identifier: Apache-2.0
// All kernels of one ISA level; compiled once per level with SNM_TABLE naming the result.
#include "amx.h"
#include "checksum.h"
#include "event.h"
#include "fma.h"
#include "lut.h"
#include "passes.h"
#include "permute.h"
#include "spikes.h"

extern "C" int32_t SNM_NET_RUN(const NetRun *);

extern "C" const snm_kernels SNM_TABLE = {
    SNM_NAME, lut, fma, event, event8, amx, amx8, integrate, pack_rows, pack_planes, unpack_rows, unpack_planes,
    draws, items, kept, decay, checksum, permute, SNM_NET_RUN,
};
