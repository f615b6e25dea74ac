// SPDX-License-Identifier: Apache-2.0
// Which input row feeds which token at which kernel tap: the one place that knows convolutions.
#pragma once
#include "simd.h"

namespace {

struct Tokens {
  const snm_geometry *g;
  int64_t pixels;  // output pixels of one time step

  explicit Tokens(const snm_geometry *geometry)
      : g(geometry), pixels(geometry->images * geometry->oh * geometry->ow) {}

  // Place of output pixel p at time `step` among all output tokens.
  int64_t token(int64_t step, int64_t p) const {
    if (g->image_stride == 1) return step * g->step_stride * (pixels / g->images) + p;
    const int64_t area = g->oh * g->ow;
    return (step * g->step_stride + p / area * g->image_stride) * area + p % area;
  }

  // rows[i]: start of the input row of pixel p0 + i at time `step`, kernel tap `tap`; pixels
  // outside the image, and those beyond the last one, read `nothing`.
  void rows(const uint8_t *input, int64_t row_bytes, const uint8_t *nothing, int64_t step,
            int64_t tap, int64_t p0, int64_t count, const uint8_t **rows) const {
    if (g->h * g->w * g->oh * g->ow * g->kh * g->kw == 1 && g->ph + g->pw == 0) {  // linear
      const int64_t there = most(0, least(count, pixels - p0));
      const uint8_t *first = input + (step * g->step_stride + p0 * g->image_stride) * row_bytes;
      for (int64_t i = 0; i < there; ++i) rows[i] = first + i * g->image_stride * row_bytes;
      for (int64_t i = there; i < count; ++i) rows[i] = nothing;
      return;
    }
    const int64_t dy = (tap / g->kw) * g->dh - g->ph, dx = (tap % g->kw) * g->dw - g->pw;
    int64_t n = p0 / (g->oh * g->ow), oy = p0 / g->ow % g->oh, ox = p0 % g->ow;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t y = oy * g->sh + dy, x = ox * g->sw + dx;
      const bool inside = n < g->images && y >= 0 && y < g->h && x >= 0 && x < g->w;
      const int64_t image = step * g->step_stride + n * g->image_stride;
      rows[i] = inside ? input + ((image * g->h + y) * g->w + x) * row_bytes : nothing;
      if (++ox == g->ow) {
        ox = 0;
        if (++oy == g->oh) oy = 0, ++n;
      }
    }
  }
};

// Whether a call's sizes belong together and its blocks lie inside of the weight: `most` channels of
// one tap each, from a whole word of spikes on, laid out one after another in units of `unit`
// channels that are `each` long.
SNM_INLINE bool blocks_fit(const snm_call *call, int64_t most_channels, int64_t unit,
                           int64_t each) {
  const snm_geometry *g = call->geometry;
  const int64_t least_one[] = {g->steps, g->h, g->w, g->oh, g->ow, g->kh, g->kw, g->sh, g->sw,
                               g->dh, g->dw, g->groups, g->cg, g->og};
  for (int64_t size : least_one)
    if (size < 1) return false;
  const bool inside = g->images >= 0 && g->ph >= 0 && g->pw >= 0 &&
                      (g->oh - 1) * g->sh + (g->kh - 1) * g->dh < g->h + 2 * g->ph &&
                      (g->ow - 1) * g->sw + (g->kw - 1) * g->dw < g->w + 2 * g->pw;
  if (!inside || call->n_blocks < 1 || !call->blocks || !call->input || !call->weights) return false;
  int64_t offset = 0;
  for (int64_t b = 0; b < call->n_blocks; ++b) {
    const int64_t *block = call->blocks + 5 * b;
    if (block[0] < 0 || block[0] >= g->kh * g->kw || block[1] < 0 || block[2] < 1 ||
        block[2] > most_channels || block[1] > g->cg - block[2] || block[3] != offset)
      return false;
    offset += ceil_div(block[2], unit) * each;
  }
  return true;
}

// A row of zeros for padding, in this thread's scratch.
SNM_INLINE const uint8_t *zero_row(int64_t bytes) {
  void *row = snm_scratch(5, static_cast<size_t>(bytes) + 64);
  memset(row, 0, static_cast<size_t>(bytes) + 64);
  return static_cast<const uint8_t *>(row);
}

// What one work item computes: output channels of a group from o0 on, for pixels from p0 on.
struct Piece {
  int64_t group, o0, p0, outputs;
};

// How much of a layer one work item covers: pixels (times all steps) and output channels.
struct Split {
  int64_t pixels, outputs;        // of one item; pixels is a multiple of the kernel's tile
  int64_t pixel_items, out_items;  // per group

  int64_t items(const snm_geometry *g) const { return pixel_items * out_items * g->groups; }

  // Output channels change fastest: neighbouring items read the same spikes.
  Piece piece(const snm_geometry *g, int64_t index) const {
    const int64_t o0 = index % out_items * outputs;
    const int64_t p0 = index / out_items % pixel_items * pixels;
    return {index / (pixel_items * out_items), o0, p0, least(outputs, g->og - o0)};
  }
};

// Large items amortise what is built once per item; more, smaller items keep the threads busy.
SNM_INLINE Split split(const snm_geometry *g, int64_t threads, int64_t tile, int64_t tokens,
                       int64_t max_out, int64_t granule) {
  Split s;
  const int64_t pixels = g->images * g->oh * g->ow;
  s.pixels = least(most(tile, tokens / g->steps / tile * tile), ceil_div(pixels, tile) * tile);
  s.outputs = least(max_out, ceil_div(g->og, granule) * granule);
  for (;;) {
    s.pixel_items = ceil_div(pixels, s.pixels);
    s.out_items = ceil_div(g->og, s.outputs);
    const int64_t items = s.items(g);
    if (threads <= 1 || items >= 4 * threads || (items >= threads && items % threads == 0)) break;
    if (s.pixels > tile)
      s.pixels = most(tile, s.pixels / 2 / tile * tile);
    else if (s.outputs > granule)
      s.outputs = ceil_div(s.outputs / 2, granule) * granule;
    else
      break;
  }
  return s;
}

}  // namespace
