// SPDX-License-Identifier: Apache-2.0
// Sums for one token at a time: the numbers that are not zero, as a list, and for each of them one
// row of weights.  Weights lie input by input, so that silent inputs cost nothing, not even reads.
#pragma once
#include "packed_rows.h"

namespace {

// a / b of numbers that fit 32 bits, which takes half as long.
SNM_INLINE int64_t quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Which numbers of a token are not zero, in ascending order; values is null where all are 1.
struct Events {
  int32_t *index;
  float *value;
  int64_t count;
  bool ones;
};

SNM_INLINE Events event_room(int64_t size) {
  const size_t bytes = sizeof(int32_t) * static_cast<size_t>(size + 64);
  return {static_cast<int32_t *>(snm_scratch(2, bytes)),
          static_cast<float *>(snm_scratch(3, bytes)), 0, true};
}

SNM_INLINE void events_of_bits(const uint64_t *bits, int64_t size, Events *e) {
  int64_t n = 0;
  for (int64_t w = 0; w * 64 < size; ++w)
    for (uint64_t word = bits[w]; word; word &= word - 1)
      e->index[n++] = static_cast<int32_t>(w * 64 + __builtin_ctzll(word));
  e->count = n;
  e->ones = true;
}

// NaN is not zero: it must reach the sums.
SNM_INLINE void events_of_floats(const float *x, int64_t size, Events *e) {
  int64_t n = 0;
  vi others = {};
  for (int64_t i = 0; i < size; i += VW) {
    const vf v = loadu(x + i);
    const vi there = ~reinterpret_cast<vi>(v == vf{});
    uint32_t mask = lanes(there);
    if (!mask) continue;
    if (size - i < VW) mask &= (1u << (size - i)) - 1;
    others |= there & ~reinterpret_cast<vi>(v == splat(1.0f));
    for (; mask; mask &= mask - 1) {
      const int64_t at = i + __builtin_ctz(mask);
      e->index[n] = static_cast<int32_t>(at);
      e->value[n++] = x[at];
    }
  }
  e->count = n;
  e->ones = lanes(others) == 0;
}

SNM_INLINE Events events_of(const NetValue *value, const void *token) {
  Events e = event_room(value->size);
  if (value->bits)
    events_of_bits(static_cast<const uint64_t *>(token), value->size, &e);
  else
    events_of_floats(static_cast<const float *>(token), value->size, &e);
  return e;
}

// Where rows are added: y[0..width), and again, `runs` times in all, w_step further on in the
// weights and y_step in y.
struct Run {
  float *y;
  int64_t width, runs, w_step, y_step;
  bool fresh;  // y is set, else added to
  bool far;    // rows come from beyond the nearest caches
};

// y[0..width) += rows of w, one after another, kRows at a time: the order of summation is that of
// the events, whatever their number.  Integers times their output's factor are the weights.
template <int kRows, bool kValued, class W>
SNM_INLINE void add_some(const W *w, const float *scale, int64_t stride, const int32_t *index,
                         int64_t base, const float *value, const Run &run, bool fresh) {
  const W *row[kRows];
  vf factor[kRows];
  for (int k = 0; k < kRows; ++k) {
    row[k] = w + (index[k] - base) * stride;
    if (kValued) factor[k] = splat(value[k]);
  }
  float *y = run.y;
  const int64_t width = run.width;
  for (int64_t r = 0; r < run.runs; ++r) {
    for (int64_t o = 0; o < width; o += VW) {
      vf sum = fresh ? vf{} : load(y + o);
      const vf of_output = sizeof(W) == 1 ? loadu(scale + o) : vf{};
#pragma GCC unroll 8
      for (int k = 0; k < kRows; ++k) {
        vf weight = weights_at(row[k] + o);
        if (sizeof(W) == 1) weight = weight * of_output;
        sum = kValued ? madd(factor[k], weight, sum) : sum + weight;
      }
      store(y + o, sum);
    }
    for (int k = 0; k < kRows; ++k) row[k] += run.w_step;
    y += run.y_step;
  }
}

// Rows index - base of w, for `count` events.
template <bool kValued, class W>
void add_rows_of(const W *w, const float *scale, int64_t stride, const int32_t *index,
                 int64_t base, const float *value, int64_t count, const Run &run) {
  int64_t k = 0;
  bool fresh = run.fresh;
  if (fresh && count == 0)
    for (int64_t o = 0; o < run.width; o += VW) store(run.y + o, vf{});
  // Processors fetch ahead of few long rows at a time, not of many.
  for (; k + 8 <= count && !run.far; k += 8, fresh = false)
    add_some<8, kValued>(w, scale, stride, index + k, base, value + k, run, fresh);
  // The few that are left, in as few passes over y: most pixels have no more than these.
  for (; k + 4 <= count; k += 4, fresh = false)
    add_some<4, kValued>(w, scale, stride, index + k, base, value + k, run, fresh);
  if (count - k == 3)
    add_some<3, kValued>(w, scale, stride, index + k, base, value + k, run, fresh);
  if (count - k == 2)
    add_some<2, kValued>(w, scale, stride, index + k, base, value + k, run, fresh);
  if (count - k == 1)
    add_some<1, kValued>(w, scale, stride, index + k, base, value + k, run, fresh);
}

// Rows of a layer from the row `from` on; `scale` is where the factors of its outputs start.
struct DenseRows {
  const NetOp *op;
  int64_t from, stride;
  const float *scale;

  void add(const Events &e, int64_t first, int64_t count, int64_t base, const Run &run) const {
    if (op->form == kDense8Rows)
      add_to(reinterpret_cast<const int8_t *>(op->memory), e, first, count, base, run);
    else
      add_to(op->memory, e, first, count, base, run);
  }

 private:
  template <class W>
  void add_to(const W *w, const Events &e, int64_t first, int64_t count, int64_t base,
              const Run &run) const {
    const int32_t *index = e.index + first;
    if (e.ones)
      add_rows_of<false>(w + from, scale, stride, index, base, e.value, count, run);
    else
      add_rows_of<true>(w + from, scale, stride, index, base, e.value + first, count, run);
  }
};

// Everything a layer needs to know of one call.
struct StreamLayer {
  const NetOp *op;
  const NetValue *in, *out;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw, groups, row;  // row: padded outputs of all groups
  bool flat;

  StreamLayer(const NetOp *o, const NetValue *values)
      : op(o), in(values + o->word[kIn0]), out(values + o->word[kOut0]) {
    const int64_t *w = o->word;
    kh = w[kLayerKernel], kw = w[kLayerKernel + 1];
    sh = w[kLayerStride], sw = w[kLayerStride + 1];
    ph = w[kLayerPadding], pw = w[kLayerPadding + 1];
    dh = w[kLayerDilation], dw = w[kLayerDilation + 1];
    groups = w[kLayerGroups];
    row = groups * op->group_stride;
    flat = w[kLayerFlat] != 0;
  }

  const float *factors(int64_t from) const { return op->scale ? op->scale + from : nullptr; }
  bool packed() const { return op->form == kPackedRows; }

  // Sums of the padded outputs [o0, o0 + width) of one group; `width` of the whole row if flat.
  void sums(const Events &e, float *y, int64_t o0, int64_t width) const {
    if (flat && !packed())
      return DenseRows{op, o0, op->group_stride, factors(o0)}.add(e, 0, e.count, 0,
                                                                  {y + o0, width, 1, 0, 0, true, true});
    const int64_t pixels = out->h * out->w;
    if (width == row)
      memset(y, 0, sizeof(float) * static_cast<size_t>(pixels * row));
    else
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t o = 0; o < width; o += VW)
            store(y + p * row + g * op->group_stride + o0 + o, vf{});
    if (flat) return flat_packed(e, y, o0, width);
    const int64_t channels = in->c / groups;
    for (int64_t k = 0; k < e.count;) {
      // Events of one pixel and group lie side by side.
      const int64_t block = quotient(e.index[k], channels), base = block * channels;
      int64_t n = 1;
      while (k + n < e.count && e.index[k + n] < base + channels) ++n;
      const int64_t pixel = groups == 1 ? block : quotient(block, groups);
      const Place at = {pixel, block - pixel * groups, base, o0, width};
      if (packed())
        scatter_packed(e, k, n, at, y);
      else
        scatter(e, k, n, at, y);
      k += n;
    }
  }

  // Events of one pixel and group, their first channel's index, and the outputs that are wanted.
  struct Place {
    int64_t pixel, group, base, o0, width;
  };

  // Of all inputs, in the order in which blocks hold them.
  void flat_packed(const Events &e, float *y, int64_t o0, int64_t width) const {
    const bool turned = op->word[kLayerFlat] == 2 && in->h * in->w > 1 && in->c > 1;
    const Events ordered = turned ? by_channel(e) : e;
    const ActiveBlocks active = active_blocks(ordered.index, ordered.value, ordered.count, 0,
                                              op->word[kLayerOf], ordered.ones);
    add_packed(op, 0, 0, o0, active, y + o0, width);
  }

  // Events of pixel after pixel as those of channel after channel.
  Events by_channel(const Events &e) const {
    const int64_t pixels = in->h * in->w, size = in->size;
    const size_t bytes = sizeof(float) * static_cast<size_t>(2 * size + 128);
    float *values = static_cast<float *>(snm_scratch(5, bytes));
    memset(values, 0, sizeof(float) * static_cast<size_t>(size + 64));
    for (int64_t k = 0; k < e.count; ++k)
      values[e.index[k] % in->c * pixels + e.index[k] / in->c] = e.ones ? 1.0f : e.value[k];
    Events turned = {e.index, values + size + 64, 0, true};
    events_of_floats(values, size, &turned);
    return turned;
  }

  // visit(tap, output pixel) for every output pixel of a row of taps that reads a pixel.
  template <class Visit>
  void each_tap(int64_t pixel, Visit visit) const {
    const int64_t line = quotient(pixel, in->w);
    const int64_t iy = line + ph, ix = pixel - line * in->w + pw;
    for (int64_t ky = 0; ky < kh; ++ky) {
      const int64_t dy = iy - ky * dh;
      if (dy < 0 || dy % sh || dy / sh >= out->h) continue;
      for (int64_t kx = 0; kx < kw; ++kx) {
        const int64_t dx = ix - kx * dw;
        if (dx < 0 || dx % sw || dx / sw >= out->w) continue;
        visit(ky * kw + kw - 1 - kx, dy / sh * out->w + dx / sw);
      }
    }
  }

  void scatter_packed(const Events &e, int64_t first, int64_t n, const Place &at, float *y) const {
    const ActiveBlocks active = active_blocks(e.index + first, e.value + first, n, at.base,
                                              op->word[kLayerOf], e.ones);
    each_tap(at.pixel, [&](int64_t tap, int64_t to) {
      add_packed(op, at.group, tap, at.o0, active,
                 y + to * row + at.group * op->group_stride + at.o0, at.width);
    });
  }

  // To every output pixel that reads this input pixel, tap by tap.
  void scatter(const Events &e, int64_t first, int64_t n, const Place &at, float *y) const {
    const int64_t w_stride = op->taps * op->group_stride, outs = at.group * op->group_stride + at.o0;
    const int64_t of_group = at.group * (in->c / groups) * w_stride + at.o0;
    if (sw == 1 && dw == 1 && at.width == row) return scatter_runs(e, first, n, at, y);
    each_tap(at.pixel, [&](int64_t tap, int64_t to) {
      DenseRows{op, of_group + tap * op->group_stride, w_stride, factors(outs)}.add(
          e, first, n, at.base, {y + to * row + outs, at.width, 1, 0, 0, false, false});
    });
  }

  // Neighbouring taps go to neighbouring pixels: one run of both; and where rows neighbour, too,
  // one run after another.
  void scatter_runs(const Events &e, int64_t first, int64_t n, const Place &at, float *y) const {
    const int64_t line = quotient(at.pixel, in->w);
    const int64_t iy = line + ph, ix = at.pixel - line * in->w + pw;
    const int64_t from = most(0, ix - kw + 1), to = least(out->w - 1, ix);
    const int64_t tap = from - (ix - kw + 1), width = (to - from + 1) * row;
    if (from > to) return;
    if (sh == 1 && dh == 1) {
      const int64_t top = most(0, iy - out->h + 1), end = least(kh - 1, iy);
      if (top > end) return;
      const Run run = {y + ((iy - top) * out->w + from) * row, width, end - top + 1, kw * row,
                       -out->w * row, false, false};
      DenseRows{op, (top * kw + tap) * row, op->taps * row, op->scale}.add(e, first, n, at.base,
                                                                          run);
      return;
    }
    for (int64_t ky = 0; ky < kh; ++ky) {
      const int64_t dy = iy - ky * dh;
      if (dy < 0 || dy % sh || dy / sh >= out->h) continue;
      const Run run = {y + (dy / sh * out->w + from) * row, width, 1, 0, 0, false, false};
      DenseRows{op, (ky * kw + tap) * row, op->taps * row, op->scale}.add(e, first, n, at.base,
                                                                         run);
    }
  }

  // Bias and the tight order of the output; rows may run over into the next one, written after.
  void finish(const float *y, float *to) const {
    const int64_t og = op->group_outputs;
    if (groups == 1 && og >= 4) {
      if (og <= VW) return finish_narrow<1>(y, to);
      if (og <= 2 * VW) return finish_narrow<2>(y, to);
      if (og <= 4 * VW) return finish_narrow<4>(y, to);
    }
    for (int64_t p = 0; p < out->h * out->w; ++p)
      for (int64_t g = 0; g < groups; ++g) {
        const float *from = y + p * row + g * op->group_stride;
        const float *bias = op->bias + g * op->group_stride;
        float *at = to + p * out->c + g * og;
        if (og < 4)
          for (int64_t o = 0; o < og; ++o) at[o] = from[o] + bias[o];
        else
          for (int64_t o = 0; o < og; o += VW) storeu(at + o, load(from + o) + load(bias + o));
      }
  }

  // Of one group whose biases stay in registers.
  template <int kVectors>
  void finish_narrow(const float *y, float *to) const {
    const int64_t og = op->group_outputs, pixels = out->h * out->w;
    vf bias[kVectors];
    for (int k = 0; k < kVectors; ++k) bias[k] = load(op->bias + least(k * VW, row - VW));
    for (int64_t p = 0; p < pixels; ++p, y += row, to += og)
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k)
        if (k * VW < og) storeu(to + k * VW, load(y + k * VW) + bias[k]);
  }
};

}  // namespace
