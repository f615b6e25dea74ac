// SPDX-License-Identifier: Apache-2.0
// The plain C interface between Python (ctypes) and the kernels.  No torch headers anywhere.
#pragma once
#include <cstddef>
#include <cstdint>

#define SNM_EXPORT __attribute__((visibility("default")))

// structures.cpp lists every field of the structures here: Python refuses a library whose
// structures are not laid out as its own.
struct NetRun;

extern "C" {

// How output tokens find their input rows.  A token is one output pixel (or one linear token) at
// one time step; a row is all channels of one input pixel.  Linear is a 1x1 kernel on 1x1 images.
typedef struct {
  int64_t steps;   // time steps that are kept together (1 unless a neuron is fused)
  int64_t images;  // images (or linear tokens) per time step
  int64_t h, w, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t groups, cg, og;  // channel groups, input and output channels of one group
  // Place of (step, image) in the batch: step * step_stride + image * image_stride.
  int64_t step_stride, image_stride;
} snm_geometry;

// One step of a neuron, with input x (see spikenm_fx/trace/neurons/spec.py for the vocabulary):
//   current' = syn_decay * current + syn_gain * x;  x = current' or current + x   (with a synapse)
//   h = decay * v + gain * x + drive;  s = h > threshold (or >=);  v' = h after the reset
// Every array holds one float per output channel.
typedef struct {
  const float *decay, *gain, *drive, *threshold, *reset;
  float *v;  // [images*oh*ow][O] membrane potentials, read and updated
  const float *syn_decay, *syn_gain;  // null without a synapse
  float *current;                     // [images*oh*ow][O]
  int32_t kind;       // reset: 0 subtracts `reset`, 1 sets to `reset`, 2 none
  int32_t timing;     // of the reset: 0 in the step of the spike, 1 in the next, 2 corrected
  int32_t inclusive;  // spike at h == threshold
  int32_t undecayed;  // the membrane sees current + x
} snm_neuron;

typedef struct {
  const snm_geometry *geometry;
  const void *input;         // bits: u64 [rows][groups*ceil(cg/64)]; dense: float [rows][groups*cg]
  const float *weights;      // layout of the kernel
  const void *codes;         // layout of the kernel
  const int64_t *blocks;     // [n_blocks][5]: tap, first channel, channels, offset, ends segment
  int64_t n_blocks;
  int64_t kind;              // LUT scheme, or non-zeros kept per pattern block for FMA
  const float *bias;         // [O] or null
  const float *scale;        // [O] for int8 weights, else null
  float *out;                // null if only bits are wanted
  int64_t out_channels_first;  // 0: [tokens][O]; 1: [steps*images][O][oh*ow]
  uint64_t *out_bits;        // [tokens][ceil(O/64)] or null
  const snm_neuron *neuron;  // null: plain layer
  int64_t threads;
} snm_call;

// What is done with the blocks [lead][m][inner] of one weight; see spikenm_fx/masks/fused.py.
enum {
  SNM_MASK = 0,      // write `mask`
  SNM_GRADIENT = 1,  // write the straight-through gradient of the logits to `out`
  SNM_LEARN = 2,     // the same, and decay what is not drawn: grad += decay * weight
  SNM_MOVE = 3,      // scores -= rate * sign(mix of momentum and grad * inverse_size + pull)
  SNM_SPREAD = 4,    // nothing but `sums`
};

typedef struct {
  float *scores;           // logits, or the scores of a deterministic mask; MOVE writes to them
  float *grad;             // dL/dm; of the masked weight where there is a weight; of MOVE: `out`
  const float *weight;     // not null: grad is that of the masked weight, dL/dm = grad * weight
  const uint8_t *present;  // [lead][m], 0 where a padded position can never be kept; or null
  uint8_t *mask;           // one byte per element
  float *out;              // gradient of the logits
  int64_t lead, m, inner, keep;
  int64_t threads;
  uint32_t key0, key1;  // of the noise
  int32_t noisy;        // 0: no noise, kappa is not used
  float kappa, inverse_tau, gain;  // gain: kappa / tau
  int32_t mode;
  int32_t credit_by_weight;  // targets are made of |weight| times the credit
  const float *credit;       // of MOVE: running credits, or null
  float *momentum;           // of MOVE: read and written
  double *sums;              // [items]: LEARN: squares of `out`; MOVE, SPREAD: squares of scores
                             // about the means of their blocks
  int64_t items;             // rows of `sums`: snm_items says how many there are
  float prior;               // logits are scores + prior * |weight| / mean |weight| of the block
  float decay, rate, inverse_size, strength, inverse_temperature;
  float look, keep_momentum;  // weights of the momentum in the step, and in the next momentum
  int32_t absolute;           // scores count by their magnitude
} snm_draws;

// Scores of the columns that one weight reads, a row for each output channel and kernel position.
typedef struct {
  const float *scores;  // [columns][stride], not negative, 0 in the rows that only pad
  int64_t stride;       // rows, rounded up to 16
  int64_t columns;      // all; channels [fixed, fixed + channels) of them move
  int64_t fixed;
  int64_t keep, of;  // 1 <= keep < of <= 64
} snm_scores;

// The order of channels that keeps most in all parts together, by swaps of two.
typedef struct {
  const snm_scores *parts;
  int64_t n_parts;
  int64_t channels;
  int64_t *order;     // [channels]: where to start; the result
  int64_t proposals;  // swaps tried by annealing
  int64_t tries;      // and then, at most, by descent
  double hot, cold;   // first and last temperature, in mean gains of a random swap
  double seconds;     // after which it stops where it is
  uint64_t seed;
  int32_t (*progress)(double share);  // null, or asked now and then; not 0 stops
} snm_permutation;

// All return 0, or a negative number if the call cannot be served (the caller falls back).
typedef struct {
  const char *name;
  int32_t (*lut)(const snm_call *);
  int32_t (*fma)(const snm_call *);
  int32_t (*event)(const snm_call *);
  int32_t (*event8)(const snm_call *);
  int32_t (*amx)(const snm_call *);   // level "amx" alone; -1 elsewhere
  int32_t (*amx8)(const snm_call *);
  int32_t (*integrate)(const snm_call *);  // input: float [tokens][O], the finished sums
  // Both return 1 if every value was exactly 0 or 1 (either zero), else 0 (bits then undefined).
  int32_t (*pack_rows)(const float *x, int64_t rows, int64_t groups, int64_t cg, uint64_t *bits,
                       int64_t threads);
  int32_t (*pack_planes)(const float *x, int64_t images, int64_t groups, int64_t cg, int64_t pixels,
                         uint64_t *bits, int64_t threads);
  void (*unpack_rows)(const uint64_t *bits, int64_t rows, int64_t groups, int64_t cg, float *x,
                      int64_t threads);
  void (*unpack_planes)(const uint64_t *bits, int64_t images, int64_t groups, int64_t cg,
                        int64_t pixels, float *x, int64_t threads);
  int32_t (*draws)(const snm_draws *);
  int64_t (*items)(const snm_draws *);  // how many sums a call writes
  // out = weight where the mask is set, else undrawn times it (for 0 a clean zero); grad += factor
  // times the weight where it is not set.  n elements each.
  void (*kept)(const float *weight, const uint8_t *mask, float undrawn, float *out, int64_t n,
               int64_t threads);
  void (*decay)(const float *weight, const uint8_t *mask, float factor, float *grad, int64_t n,
                int64_t threads);
  uint64_t (*checksum)(const void *memory, int64_t bytes);
  int32_t (*permute)(const snm_permutation *);
  int32_t (*net_run)(const struct NetRun *);  // net.h; all of it was checked when it was read
} snm_kernels;

// Provided once by dispatch.cpp to the objects of every ISA level.
SNM_EXPORT const snm_kernels *snm_level(int32_t level);
void snm_parallel(int64_t items, int64_t threads, void (*body)(void *, int64_t), void *context);
void *snm_scratch(int slot, size_t bytes);  // per thread, 64-byte aligned, kept between calls
}
