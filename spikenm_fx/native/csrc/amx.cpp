// SPDX-License-Identifier: Apache-2.0
// The kernels that need matrix tiles; all others of level "amx" are those of level "v4".
#include "amx.h"

extern "C" int32_t snm_amx(const snm_call *call) { return Amx<false>(call).start(); }
extern "C" int32_t snm_amx8(const snm_call *call) { return Amx<true>(call).start(); }
