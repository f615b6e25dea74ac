// SPDX-License-Identifier: Apache-2.0
// Sizes of one call, and where its values lie: planned once for each number of steps and images.
#pragma once
#include "net_model.h"

// What a call's input shape says.
struct NetSizes {
  int64_t steps = 1, images = 1;
  int64_t batch[SPIKENM_RANK] = {};  // the free axes, in the input's order
};

// One input's shape.
struct NetShape {
  const int64_t *size;
  int32_t rank;
};

struct NetPlan {
  int64_t steps, images, copies;  // copies: for as many threads that run images of their own
  NetMemory arena;
  std::vector<void *> memory;     // by copy and value
  std::vector<void *> shifted;    // by copy and value: of one step of a loop
  std::vector<float *> states;    // by copy and state: of the image that runs

  // Values whose lives do not overlap share their place.
  bool lay_out(const NetModel &model, NetFailure *fail);
};

// The sizes that all inputs' shapes ask for; `step` leaves the time axis out.
bool net_sizes(const NetModel &model, const NetShape *shapes, int32_t count, bool step,
               NetSizes *sizes, NetFailure *fail);

// Shape of an output, and its rank.
int32_t net_shape(const NetPort &port, const NetSizes &sizes, bool step, int64_t *shape);

// Between a tensor as the caller has it and the tokens of a value; of all images (-1), or of one.
void net_load(const NetModel &model, const NetPort &port, const NetSizes &sizes, bool step,
              int64_t image, const float *x, float *to);
void net_store(const NetModel &model, const NetPort &port, const NetSizes &sizes, bool step,
               int64_t image, const void *from, float *y);
