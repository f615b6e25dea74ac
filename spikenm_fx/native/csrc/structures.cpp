// SPDX-License-Identifier: Apache-2.0
// What the compiler made of the structures in abi.h, for Python to compare with its mirrors.
#include "abi.h"

namespace {

struct Row {
  const char *structure, *field;  // an empty field: the structure itself
  int64_t offset, size;
};

#define WHOLE(S) {#S, "", 0, sizeof(S)}
#define FIELD(S, f) {#S, #f, offsetof(S, f), sizeof(static_cast<S *>(nullptr)->f)}

const Row rows[] = {
    WHOLE(snm_geometry),
    FIELD(snm_geometry, steps), FIELD(snm_geometry, images),
    FIELD(snm_geometry, h), FIELD(snm_geometry, w),
    FIELD(snm_geometry, oh), FIELD(snm_geometry, ow),
    FIELD(snm_geometry, kh), FIELD(snm_geometry, kw),
    FIELD(snm_geometry, sh), FIELD(snm_geometry, sw),
    FIELD(snm_geometry, ph), FIELD(snm_geometry, pw),
    FIELD(snm_geometry, dh), FIELD(snm_geometry, dw),
    FIELD(snm_geometry, groups), FIELD(snm_geometry, cg), FIELD(snm_geometry, og),
    FIELD(snm_geometry, step_stride), FIELD(snm_geometry, image_stride),

    WHOLE(snm_neuron),
    FIELD(snm_neuron, decay), FIELD(snm_neuron, gain), FIELD(snm_neuron, drive),
    FIELD(snm_neuron, threshold), FIELD(snm_neuron, reset), FIELD(snm_neuron, v),
    FIELD(snm_neuron, syn_decay), FIELD(snm_neuron, syn_gain), FIELD(snm_neuron, current),
    FIELD(snm_neuron, kind), FIELD(snm_neuron, timing),
    FIELD(snm_neuron, inclusive), FIELD(snm_neuron, undecayed),

    WHOLE(snm_call),
    FIELD(snm_call, geometry), FIELD(snm_call, input), FIELD(snm_call, weights),
    FIELD(snm_call, codes), FIELD(snm_call, blocks), FIELD(snm_call, n_blocks),
    FIELD(snm_call, kind), FIELD(snm_call, bias), FIELD(snm_call, scale),
    FIELD(snm_call, out), FIELD(snm_call, out_channels_first), FIELD(snm_call, out_bits),
    FIELD(snm_call, neuron), FIELD(snm_call, threads),

    WHOLE(snm_draws),
    FIELD(snm_draws, scores), FIELD(snm_draws, grad), FIELD(snm_draws, weight),
    FIELD(snm_draws, present), FIELD(snm_draws, mask), FIELD(snm_draws, out),
    FIELD(snm_draws, lead), FIELD(snm_draws, m), FIELD(snm_draws, inner),
    FIELD(snm_draws, keep), FIELD(snm_draws, threads), FIELD(snm_draws, key0),
    FIELD(snm_draws, key1), FIELD(snm_draws, noisy), FIELD(snm_draws, kappa),
    FIELD(snm_draws, inverse_tau), FIELD(snm_draws, gain), FIELD(snm_draws, mode),
    FIELD(snm_draws, credit_by_weight), FIELD(snm_draws, credit), FIELD(snm_draws, momentum),
    FIELD(snm_draws, sums), FIELD(snm_draws, items), FIELD(snm_draws, prior),
    FIELD(snm_draws, decay), FIELD(snm_draws, rate), FIELD(snm_draws, inverse_size),
    FIELD(snm_draws, strength), FIELD(snm_draws, inverse_temperature), FIELD(snm_draws, look),
    FIELD(snm_draws, keep_momentum), FIELD(snm_draws, absolute),

    WHOLE(snm_scores),
    FIELD(snm_scores, scores), FIELD(snm_scores, stride), FIELD(snm_scores, columns),
    FIELD(snm_scores, fixed), FIELD(snm_scores, keep), FIELD(snm_scores, of),

    WHOLE(snm_permutation),
    FIELD(snm_permutation, parts), FIELD(snm_permutation, n_parts),
    FIELD(snm_permutation, channels), FIELD(snm_permutation, order),
    FIELD(snm_permutation, proposals), FIELD(snm_permutation, tries),
    FIELD(snm_permutation, hot), FIELD(snm_permutation, cold),
    FIELD(snm_permutation, seconds), FIELD(snm_permutation, seed),
    FIELD(snm_permutation, progress),

    WHOLE(snm_kernels),
    FIELD(snm_kernels, name),
    FIELD(snm_kernels, lut), FIELD(snm_kernels, fma),
    FIELD(snm_kernels, event), FIELD(snm_kernels, event8),
    FIELD(snm_kernels, amx), FIELD(snm_kernels, amx8), FIELD(snm_kernels, integrate),
    FIELD(snm_kernels, pack_rows), FIELD(snm_kernels, pack_planes),
    FIELD(snm_kernels, unpack_rows), FIELD(snm_kernels, unpack_planes),
    FIELD(snm_kernels, draws), FIELD(snm_kernels, items),
    FIELD(snm_kernels, kept), FIELD(snm_kernels, decay), FIELD(snm_kernels, checksum),
    FIELD(snm_kernels, permute), FIELD(snm_kernels, net_run),
};

}  // namespace

extern "C" {

// Row `index` of the table: 1, or 0 where there is none.
SNM_EXPORT int32_t snm_field(int64_t index, const char **structure, const char **field,
                             int64_t *offset, int64_t *size) {
  if (index < 0 || index >= static_cast<int64_t>(sizeof rows / sizeof rows[0])) return 0;
  *structure = rows[index].structure;
  *field = rows[index].field;
  *offset = rows[index].offset;
  *size = rows[index].size;
  return 1;
}
}
