// SPDX-License-Identifier: Apache-2.0
// A network as a flat list of typed operations on planned buffers: plain data, no functions, as it
// is read by code of every ISA level.  spikenm_fx/program/code.py writes it and says what the words
// mean.
//
// A value holds, for each time step and image, `size` = h * w * c numbers, channels innermost:
// floats, or spikes as bits.  One such vector is a token.
#pragma once
#include "abi.h"
#include "spikenm.h"

enum NetOpCode : int64_t {
  kLayer = 1, kNeuron, kPool, kJoin, kAffine, kRelu, kConcat, kReduce, kStrided, kNorm,
  kRecall, kStore, kCompare, kPointwise, kSoftmax, kSteps, kOpCodes  // from version 2 on
};
enum NetRole : int64_t { kTime, kBatch, kChannel, kHeight, kWidth, kRoles };
enum NetEmits : int64_t { kSpikes, kMembrane, kCounts };
enum NetPool : int64_t { kMax, kAverage, kAdaptiveMax, kAdaptiveAverage };
enum NetJoin : int64_t { kAdd, kSub, kMul, kAndNot, kCopy };
enum NetReduce : int64_t { kSum, kMean, kLast };
enum NetCompare : int64_t { kGreater, kGreaterEqual, kLess, kLessEqual, kCompares };
enum NetFunction : int64_t { kSigmoid, kTanh, kGelu, kGeluTanh, kSilu, kExp, kFunctions };

constexpr int64_t kNetVersion = 2, kOpWords = 32, kNoValue = -1;
constexpr int64_t kLanesMost = 16;  // floats of the widest vector
constexpr int64_t kStridedLoops = 5;

// Words of an operation; those beyond kBias depend on the code.
enum NetWord {
  kCode, kIn0, kIn1, kOut0, kOut1, kTensor0, kTensor1, kTensor2, kTensor3,
  kLayerKeep = 9, kLayerOf, kLayerOutputs, kLayerInputs, kLayerGroups, kLayerKernel,
  kLayerStride = 16, kLayerPadding = 18, kLayerDilation = 20, kLayerFlat = 22,
  kNeuronReset = 9, kNeuronTiming, kNeuronInclusive, kNeuronSynapse, kNeuronEmits, kNeuronForgets,
  kNeuronState,
  kPoolMode = 9, kPoolKernel, kPoolStride = 12, kPoolPadding = 14, kPoolDilation = 16,
  kPoolCountsPadding = 18, kPoolDivisor,
  kMode = 9, kStridedCount, kStridedLoop, kStridedOffset = kStridedLoop + 4 * kStridedLoops,
  kRecallState = 9, kRecallForgets, kStoreState = 9,
  kSoftmaxMode = 9, kSoftmaxSize, kSoftmaxApart,
};

enum NetType : int32_t { kF32, kF16, kBF16, kI8, kU8, kI64 };

// Bits of a position in a block of `of` inputs.
static inline int64_t position_bits(int64_t of) {
  return of > 1 ? 64 - __builtin_clzll(static_cast<uint64_t>(of - 1)) : 0;
}

struct NetValue {
  int64_t bits, timed, h, w, c;
  int64_t size;    // h * w * c
  int64_t stride;  // of a token, in floats (or words of 64 bits)
};

struct NetAxis {
  int64_t role, size, joined;  // joined: one axis of the tensor with the one before
};

struct NetPort {
  int64_t value, rank;
  NetAxis axes[SPIKENM_RANK];
};

struct NetTensor {
  const uint8_t *data;
  int64_t bytes, rank, shape[SPIKENM_RANK];
  int32_t dtype;  // see NetType
};

// How the weights of a layer lie in memory; each row of taps from its end, so that neighbouring
// outputs read neighbouring rows.
//   kDenseRows, kDense8Rows: [group][input][tap][group_stride] floats, or int8.
//   kTapRows: [block of outputs][tap][input][kOutputBlock] floats, of one group; taps in order, and
//   the last block only as wide as there are outputs.
//   kPackedRows: [group][block of inputs][tap][kept][group_outputs] values as they are stored, and
//   beside each value its position in the block: packed bits, eight outputs to a whole byte.
enum NetForm : int64_t { kDenseRows, kDense8Rows, kTapRows, kPackedRows };
constexpr int64_t kOutputBlock = 32;

struct NetOp {
  const int64_t *word;  // kOpWords of them
  float *memory;        // what was derived from the file's tensors, or null
  // Layer: see NetForm for the weights in memory; biases and the factors of int8 lie behind them.
  int64_t taps, group_outputs, group_stride, inputs;
  const float *bias;
  const float *scale;  // of int8 weights: [kernel width][group][group_stride]; else null
  int64_t form, type;    // NetForm, and the NetType of packed values
  const uint8_t *codes;  // of packed rows
  int64_t code_bytes;    // of one packed row
  bool with_neuron;  // the next operation is a neuron that alone reads what this layer gives
  // Neuron and affine: rows of parameters, each `wide` long: 16 equal ones, or one per number.
  int64_t wide;
  int64_t state_stride;  // of a neuron: floats of one image's membranes
  const float *floor;    // of a neuron whose membrane cannot fall below it: that row; else null
};

// Operations [from, to) that run step by step, as a step reads what the one before it stored.
struct NetLoop {
  int64_t from, to;
  int64_t timed;  // of all values that they make; 0 where one call is one step
};

// One run: where everything lies.
struct NetRun {
  const NetOp *ops;
  int64_t n_ops;
  const NetValue *values;
  int64_t steps, images, threads;
  const NetLoop *loops;  // in order, apart from each other
  int64_t n_loops, n_values;
  void *const *memory;   // by value
  void **shifted;        // room for as many
  float *const *states;  // by state: [images][stride] membranes
  int64_t state_images;  // the currents lie behind the membranes of so many images
  void (*observe)(void *context, int64_t op, const void *in, void *out);
  void *context;
};
