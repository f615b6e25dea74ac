// SPDX-License-Identifier: Apache-2.0
// From packed N:M values and indices to the rows of weights that layers run on, and back.
#pragma once
#include "net.h"

// Where the parts of a layer's memory begin, in bytes, and how large it is.
struct NetLayerMemory {
  int64_t form, codes, code_bytes, bias, scale, size;
};

// A weight as spikenm_fx/pack/weights/format.py stores it; see there.
struct StoredWeight {
  const NetTensor *values, *indices, *scale, *bias;  // scale of int8; bias or null
  int64_t keep, of;
  int64_t outputs, inputs, taps, groups;  // inputs of one group
  int64_t kw;  // taps of a row of the kernel
  bool gathers;  // rows of floats lie as kTapRows
  int64_t pixels, channels;  // channels not 0: inputs run (channel, pixel), the value other way

  bool fits() const;
  int64_t index_bytes() const { return outputs * ((kept() * position_bits(of) + 7) / 8); }
  // Rows of `stride` outputs of a group; `small` keeps them packed.  False if it is too large.
  bool plan(bool small, int64_t stride, NetLayerMemory *memory) const;
  // Fills memory of zeros; false for indices or values that cannot be.
  bool lay_out(char *to, const NetLayerMemory &memory, int64_t stride) const;
  // Of packed rows: values and indices as they were stored, into memory of zeros.
  void read_back(const char *from, const NetLayerMemory &memory, uint8_t *to_values,
                 uint8_t *to_indices) const;

 private:
  int64_t blocks() const { return (inputs + of - 1) / of; }
  int64_t kept() const { return taps * blocks() * keep; }  // of one output
  int64_t element() const { return values->dtype == kF32 ? 4 : values->dtype == kI8 ? 1 : 2; }
  static constexpr int64_t kTogether = 16;
  bool lay_out_some(char *to, const NetLayerMemory &memory, int64_t stride, int64_t first,
                    int64_t count) const;
  void put_packed(char *to, const NetLayerMemory &memory, int64_t row, int64_t output, int64_t from,
                  int64_t position) const;
  void put_dense(char *to, const NetLayerMemory &memory, int64_t at, int64_t from,
                 float weight) const;
  float value(int64_t at) const;
  int64_t place_of(int64_t tap) const;
  int64_t packed_row(int64_t output, int64_t at) const;
  int64_t tap_row(int64_t output, int64_t stride, int64_t input, int64_t tap) const;
  int64_t dense_row(int64_t group, int64_t stored, int64_t tap) const;
  int64_t code_bit(int64_t output) const;
};
