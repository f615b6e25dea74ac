// SPDX-License-Identifier: Apache-2.0
// Sums of a convolution, output by output: for every pixel the rows of weights of the events that
// it reads, added in registers.  Events lie pixel after pixel and channel after channel, and so do
// the rows of one line of taps: what an output reads of one line is one run of events, whose rows
// are as far from each other as the events are.  Sums are added in the order of the inputs, as
// stream.h adds them: both give the same bits.
//
// Outputs come in narrow blocks: the rows of one line of taps stay in the nearest caches while all
// pixels and steps of a tile pass by, and their sums wait in the tile for the next line.  A neuron
// that is all that reads the sums takes them from there.
#pragma once
#include "event_lists.h"
#include "net_ops.h"

namespace {

// Some lines and columns of taps of a block of outputs, or of two, and the events of a token.
struct Taps {
  const float *w;
  int64_t apart;  // from one block of outputs to the next
  int64_t first_line, end, first_column, end_column;
  const int32_t *starts;
  const uint32_t *offset;
  const float *value;
  const char *ahead;  // what is read after them
  int64_t share;      // lines of a cache that each pixel fetches from there
};

// Adds the row of event k to the sums of kVectors vectors of outputs.  `w`: where the row of the
// token's first number would lie.
template <int kVectors, bool kValued>
SNM_INLINE void add_row(const Taps &taps, uintptr_t w, int64_t k, vf *sum) {
  constexpr int kOfBlock = static_cast<int>(kOutputBlock / VW);
  constexpr int kNarrow = kVectors * VW < kOutputBlock ? 1 : 0;
  const float *row = reinterpret_cast<const float *>(w + (taps.offset[k] >> kNarrow));
  const vf factor = kValued ? splat(taps.value[k]) : vf{};
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const vf weight = loadu(row + (j / kOfBlock ? taps.apart : 0) + j % kOfBlock * VW);
    sum[j] = kValued ? madd(factor, weight, sum[j]) : sum[j] + weight;
  }
}

// A layer whose weights lie as kTapRows, and the neuron behind it or null.
struct GatherLayer {
  const NetRun *run;
  const NetOp *neuron;
  StreamLayer layer;
  EventLists lists;
  int64_t given;                  // steps that are summed up, of which some are listed at a time
  int64_t first_step = 0, steps = 1, first = 0, images = 0;
  int64_t band = 1, bands = 1;    // lines of a tile, and tiles of an image
  int64_t lines = 1, columns;     // of taps, whose rows stay in the nearest cache together
  int64_t outputs;                // of a tile: one block, or two
  bool constant;                  // every step is given the same

  static constexpr int64_t kMostBytes = 8 << 20, kTilePixels = 1024, kNearBytes = 24 << 10;
  static constexpr int64_t kMiddleBytes = 256 << 10, kBusy = 36;

  GatherLayer(const NetRun *r, const NetOp *op, const NetOp *behind)
      : run(r), neuron(behind), layer(op, r->values), lists(layer.in) {
    constant = same_steps();
    given = layer.out->timed && !constant ? r->steps : 1;
    const int64_t line = layer.kw * layer.in->c * kOutputBlock * 4;
    lines = most(1, least(layer.kh, kNearBytes / line)), columns = layer.kw;
    // Two blocks have more sums under way for each event; one has rows that stay nearer.
    outputs = line <= kNearBytes ? 2 * kOutputBlock : kOutputBlock;
  }

  // An image may be given again at each step, and takes a layer no longer then than one step.
  bool same_steps() const {
    const NetValue *in = layer.in;
    if (in->bits || !in->timed || run->steps == 1) return false;
    const float *x = static_cast<const float *>(run->memory[layer.op->word[kIn0]]);
    for (int64_t token = run->images; token < run->steps * run->images; ++token)
      if (memcmp(x + (token - run->images) * in->stride, x + token * in->stride,
                 sizeof(float) * static_cast<size_t>(in->size)) != 0)
        return false;
    return true;
  }

  // So many steps and images at a time that their events and sums stay in a cache.
  void start(int64_t threads) {
    const int64_t fitting = kMostBytes / lists.bytes, most_steps = kTilePixels / layer.out->w;
    const int64_t longest = least(given, most(1, least(fitting, most_steps)));
    const int64_t together = least(run->images, most(1, fitting / longest));
    lists.take(longest * together);
    for (first = 0; first < run->images; first += together)
      for (first_step = 0; first_step < given; first_step += longest) {
        images = least(together, run->images - first);
        steps = least(longest, given - first_step);
        some(threads);
      }
  }

  void some(int64_t threads) {
    const int64_t blocks = ceil_div(layer.row, outputs), height = layer.out->h;
    snm_parallel(steps * images, threads, list_item, this);
    // Runs of one tap alone are long enough where many inputs are not silent.
    int64_t all = 0;
    for (int64_t image = 0; image < images; ++image) all += events(image);
    const bool busy = all >= kBusy * steps * images * lists.pixels;
    columns = busy && lines == 1 ? 1 : layer.kw;
    band = most(1, least(height, kTilePixels / (steps * layer.out->w)));
    if (threads > 1)
      while (band > 1 && blocks * images * ceil_div(height, band) < 4 * threads)
        band = ceil_div(band, 2);
    bands = ceil_div(height, band);
    snm_parallel(blocks * images * bands, threads, tile_item, this);
  }

  // Of what is read: one step that is the same at all times is summed up once.
  int64_t shown(const NetValue *out) const {
    return given > 1 ? steps : out->timed ? run->steps : 1;
  }

  // Lists lie step by step.
  static void list_item(void *self, int64_t index) {
    const GatherLayer *of = static_cast<const GatherLayer *>(self);
    const NetValue *in = of->layer.in;
    const int64_t token = (of->first_step + index / of->images) * of->run->images + of->first +
                          index % of->images;
    const int64_t bytes = in->stride * static_cast<int64_t>(in->bits ? 8 : 4);
    of->lists.fill(index, static_cast<const char *>(of->run->memory[of->layer.op->word[kIn0]]) +
                              token * bytes);
  }

  // All images and tiles pass by one block of outputs after another.
  static void tile_item(void *self, int64_t index) {
    const GatherLayer *of = static_cast<const GatherLayer *>(self);
    const int64_t wide = of->outputs, block = index / of->bands / of->images * wide;
    Tile tile = {index / of->bands % of->images, index % of->bands * of->band, 0, block,
                 least(wide, of->layer.row - block), nullptr, false};
    tile.to = least(tile.from + of->band, of->layer.out->h);
    const int64_t pixels = of->steps * (tile.to - tile.from) * of->layer.out->w;
    tile.y = static_cast<float *>(
        snm_scratch(0, sizeof(float) * static_cast<size_t>(pixels * wide)));
    tile.fetches = of->fetches(tile.image);
    for (int64_t ky = 0; ky < of->layer.kh; ky += of->lines)
      for (int64_t kx = 0; kx < of->layer.kw; kx += of->columns)
        for (int64_t t = 0; t < of->steps; ++t) of->add_taps(tile, t, ky, kx);
    of->finish(tile);
  }

  // Sums of `width` outputs from o0 on of the lines [from, to) of an image: [step][pixel][outputs].
  struct Tile {
    int64_t image, from, to, o0, width;
    float *y;
    bool fetches;  // weights, ahead of their use
  };

  int64_t events(int64_t image) const {
    int64_t count = 0;
    for (int64_t t = 0; t < steps; ++t) count += lists.starts(t * images + image)[lists.pixels];
    return count;
  }

  // Of weights that no near cache holds, where most rows are read.
  bool fetches(int64_t image) const {
    return layer.op->taps * layer.in->c * layer.row * 4 >= kMiddleBytes &&
           events(image) >= layer.in->c;
  }

  // The taps of some lines and columns, from these on.
  void add_taps(const Tile &tile, int64_t t, int64_t ky, int64_t kx) const {
    constexpr int kBlock = static_cast<int>(kOutputBlock / VW);
    const bool ones = lists.ones(t * images + tile.image);
    int64_t o = 0;
    if constexpr (VW > 4)
      if (tile.width == 2 * kOutputBlock)
        return ones ? add_taps_of<2 * kBlock, false>(tile, 0, t, ky, kx)
                    : add_taps_of<2 * kBlock, true>(tile, 0, t, ky, kx);
    for (; o + kOutputBlock <= tile.width; o += kOutputBlock)
      ones ? add_taps_of<kBlock, false>(tile, o, t, ky, kx)
           : add_taps_of<kBlock, true>(tile, o, t, ky, kx);
    if (o == tile.width) return;  // else there is a last, narrower block
    ones ? add_taps_of<kBlock / 2, false>(tile, o, t, ky, kx)
         : add_taps_of<kBlock / 2, true>(tile, o, t, ky, kx);
  }

  // A function of its own: among all else of a tile the innermost loops lack registers.
  template <int kVectors, bool kValued>
  __attribute__((noinline)) void add_taps_of(const Tile &tile, int64_t o, int64_t t,
                                             int64_t first_line, int64_t first_column) const {
    constexpr int64_t width = least(kOutputBlock, kVectors * VW);
    // Sums of two pixels grow in turn: an addition does not wait for the one before it.
    constexpr int kTogether = kVectors <= 4 ? 2 : 1;
    const NetValue *out = layer.out;
    const int64_t of_tap = layer.in->c * width, list = t * images + tile.image;
    Taps taps = {};
    taps.w = layer.op->memory + (tile.o0 + o) * layer.kh * layer.kw * layer.in->c;
    taps.apart = layer.kh * layer.kw * of_tap;
    taps.first_line = first_line, taps.end = least(layer.kh, first_line + lines);
    taps.first_column = first_column, taps.end_column = least(layer.kw, first_column + columns);
    taps.starts = lists.starts(list), taps.offset = lists.offset(list);
    taps.value = lists.value(list);
    const int64_t pixels = (tile.to - tile.from) * out->w;
    // What follows is read next, from far away, and here and there: it is fetched in passing.
    const int64_t fetched = (taps.end - first_line) * (taps.end_column - first_column) * of_tap * 4;
    taps.share = tile.fetches ? ceil_div(fetched, steps * pixels * 64) : 0;
    taps.ahead = reinterpret_cast<const char *>(
        taps.w + ((taps.end - 1) * layer.kw + taps.end_column) * of_tap);
    taps.ahead += t * pixels * taps.share * 64;
    float *y = tile.y + t * pixels * outputs + o;
    for (int64_t oy = tile.from; oy < tile.to; ++oy) {
      int64_t ox = 0;
      for (; ox + kTogether <= out->w; ox += kTogether, y += kTogether * outputs)
        add_pixels<kTogether, kVectors, kValued>(&taps, oy, ox, y);
      for (; ox < out->w; ++ox, y += outputs)
        add_pixels<1, kVectors, kValued>(&taps, oy, ox, y);
    }
  }

  // Adds what a pixel reads to its sums, or what two neighbours read.
  template <int kPixels, int kVectors, bool kValued>
  __attribute__((always_inline)) void add_pixels(Taps *taps, int64_t oy, int64_t ox,
                                                 float *y) const {
    constexpr int64_t bytes = least(kOutputBlock, kVectors * VW) * 4;
    const NetValue *in = layer.in;
    for (int64_t k = 0; k < kPixels * taps->share; ++k, taps->ahead += 64)
      __builtin_prefetch(taps->ahead, 0, 2);
    const bool opens = taps->first_line + taps->first_column == 0;
    const int64_t x = ox * layer.sw - layer.pw;
    vf sum[kPixels][kVectors];
    int64_t left[kPixels], right[kPixels];
#pragma GCC unroll 2
    for (int p = 0; p < kPixels; ++p) {
      right[p] = most(0, least(in->w, x + p * layer.sw + taps->end_column));
      left[p] = least(most(0, x + p * layer.sw + taps->first_column), right[p]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[p][j] = opens ? vf{} : load(y + p * outputs + j * VW);
    }
    for (int64_t ky = taps->first_line; ky < taps->end; ++ky) {
      const int64_t iy = oy * layer.sh - layer.ph + ky * layer.dh;
      if (iy < 0 || iy >= in->h) continue;
      uintptr_t w[kPixels];
      int64_t from[kPixels], count[kPixels], both = 0;
#pragma GCC unroll 2
      for (int p = 0; p < kPixels; ++p) {
        const int64_t row = ky * layer.kw - iy * in->w - x - p * layer.sw;
        w[p] = reinterpret_cast<uintptr_t>(taps->w) + static_cast<uintptr_t>(row * in->c * bytes);
        from[p] = taps->starts[iy * in->w + left[p]];
        count[p] = taps->starts[iy * in->w + right[p]] - from[p];
      }
      if constexpr (kPixels == 2)
        for (const int64_t shorter = least(count[0], count[1]); both < shorter; ++both) {
          add_row<kVectors, kValued>(*taps, w[0], from[0] + both, sum[0]);
          add_row<kVectors, kValued>(*taps, w[1], from[1] + both, sum[1]);
        }
#pragma GCC unroll 2
      for (int p = 0; p < kPixels; ++p)
        for (int64_t k = both; k < count[p]; ++k)
          add_row<kVectors, kValued>(*taps, w[p], from[p] + k, sum[p]);
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(y + p * outputs + j * VW, sum[p][j]);
  }

  void finish(const Tile &tile) const {
    if (neuron) return fire(tile);
    const NetValue *out = layer.out;
    const int64_t pixels = (tile.to - tile.from) * out->w;
    for (int64_t t = 0; t < shown(out); ++t) {
      const float *y = tile.y + (given > 1 ? t : 0) * pixels * outputs;
      float *to = static_cast<float *>(run->memory[layer.op->word[kOut0]]) +
                  ((first_step + t) * run->images + first + tile.image) * out->stride +
                  tile.from * out->w * out->c + tile.o0;
      for (int64_t p = 0; p < pixels; ++p, y += outputs, to += out->c)
        for (int64_t o = 0; o < tile.width; o += VW)
          store_part(to + o, load(y + o) + load(layer.op->bias + tile.o0 + o),
                     least(VW, out->c - tile.o0 - o));
    }
  }

  // All steps of the neurons of a pixel; there are 32 outputs of a block, or 64.
  void fire(const Tile &tile) const {
    const NetNeuron behind(neuron, run->values);
    const NetValue *out = behind.out;
    const int64_t pixels = (tile.to - tile.from) * out->w, image = first + tile.image;
    const NeuronLanes same(&behind.rule, 0, VW);
    const NeuronLanes *lasting = neuron->wide == kLanesMost ? &same : nullptr;
    float *state = run->states[neuron->word[kNeuronState]] + image * neuron->state_stride;
    float *current = state + run->state_images * neuron->state_stride;
    uint32_t *bits =
        static_cast<uint32_t *>(run->memory[neuron->word[kOut0]]) +
        (first_step * run->images + image) * out->stride * 2;
    for (int64_t o = 0; o < tile.width; o += kOutputBlock)
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t i = (tile.from * out->w + p) * out->c + tile.o0 + o;
        fire_block(behind, lasting, tile.y + p * outputs + o, given > 1 ? pixels * outputs : 0,
                   tile.o0 + o, i, state + i, current + i, bits + i / 32);
      }
  }

  // `lasting`: the parameters, where all neurons have the same.
  void fire_block(const NetNeuron &behind, const NeuronLanes *lasting, const float *y, int64_t step,
                  int64_t o, int64_t i, float *state, float *current, uint32_t *bits) const {
    const snm_neuron rule = behind.rule;  // a copy that no store can change
    const float *bias = layer.op->bias + o;
    const bool done = lasting && of_usual(&rule, [&](auto usual) {
      const NeuronLanes own = *lasting;
      fire_steps(behind, y, step, bias, state, nullptr, bits,
                 [=](int64_t, vf x, vf &v, vf &) { return own.step_as(usual, x, v); });
    });
    if (done) return;
    fire_steps(behind, y, step, bias, state, rule.syn_decay ? current : nullptr, bits,
               [&](int64_t at, vf x, vf &v, vf &syn) {
                 const NeuronLanes own = lasting ? *lasting : NeuronLanes(&rule, i + at, VW);
                 return own.step(&rule, x, v, syn);
               });
  }

  // fires(place in the block, input, membrane, current): the lanes that do.
  template <class Fires>
  void fire_steps(const NetNeuron &behind, const float *y, int64_t step, const float *bias,
                  float *state, float *current, uint32_t *bits, Fires fires) const {
    const int64_t all = shown(behind.out);
    const int64_t bits_step = run->images * behind.out->stride * 2;
    constexpr int kVectors = static_cast<int>(least(4, kOutputBlock / VW));
    for (int64_t first = 0; first < kOutputBlock; first += kVectors * VW) {
      vf v[kVectors], syn[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        v[j] = loadu(state + first + j * VW);
        syn[j] = current ? loadu(current + first + j * VW) : vf{};
      }
      for (int64_t t = 0; t < all; ++t) {
        uint32_t word = first ? bits[t * bits_step] : 0;
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          const int64_t at = first + j * VW;
          const vf x = load(y + t * step + at) + load(bias + at);
          word |= static_cast<uint32_t>(lanes(fires(at, x, v[j], syn[j]))) << at;
        }
        bits[t * bits_step] = word;
      }
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        storeu(state + first + j * VW, v[j]);
        if (current) storeu(current + first + j * VW, syn[j]);
      }
    }
  }
};

}  // namespace
