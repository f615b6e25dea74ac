// SPDX-License-Identifier: Apache-2.0
// From packed N:M values and indices to rows of weights, one for each input.
#pragma once
#include "net.h"

// A weight as spikenm_fx/pack/weights/format.py stores it; see there.
struct StoredWeight {
  const NetTensor *values, *indices, *scale, *bias;  // scale of int8; bias or null
  int64_t keep, of;
  int64_t outputs, inputs, taps, groups;  // inputs of one group
  int64_t kw;  // taps of a row of the kernel
  int64_t pixels, channels;  // channels not 0: inputs run (channel, pixel), the value the other way

  bool fits() const;
  // Fills [group][input][tap][stride], each row of taps from its end, and the biases behind; false for indices or values that
  // cannot be.
  bool lay_out(float *to, int64_t stride) const;

 private:
  float value(int64_t at) const;
  int64_t position(int64_t row, int64_t at) const;
};
