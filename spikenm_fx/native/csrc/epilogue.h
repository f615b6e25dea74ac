// SPDX-License-Identifier: Apache-2.0
// What happens to finished sums: scale, bias, then either a store or the neuron over all steps.
#pragma once
#include "tokens.h"

namespace {

constexpr int TILE = 64;  // tokens of one channel-major tile

// Sums of one work item: `outputs` channels from o0 of a group, `pixels` from p0, all steps.
// Channel-major sums lie as [step][pixel / TILE][stride][TILE], token-major as
// [step][pixel][stride].
struct Sums {
  const float *y;
  int64_t stride, o0, outputs, p0, pixels;
  int64_t count = 1ll << 62;  // of pixels to finish, where that is fewer
  int64_t step_pixels = -1;   // between two steps, where not `pixels`: 0 if all steps are alike

  int64_t row(int64_t step, int64_t p) const {
    return step * (step_pixels < 0 ? pixels : step_pixels) + p;
  }
};

SNM_INLINE vf load_part(const float *p, int64_t n) {
  if (n >= VW) return loadu(p);
  alignas(64) float part[VW] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

SNM_INLINE void store_part(float *p, vf v, int64_t n) {
  if (n >= VW) return storeu(p, v);
  alignas(64) float part[VW];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// One neuron step on VW channels: updates v (and the current), returns the lanes that fire.
struct NeuronLanes {
  vf decay, gain, drive, threshold, reset, syn_decay, syn_gain;

  NeuronLanes(const snm_neuron *n, int64_t o, int64_t count)
      : decay(load_part(n->decay + o, count)),
        gain(load_part(n->gain + o, count)),
        drive(load_part(n->drive + o, count)),
        threshold(load_part(n->threshold + o, count)),
        reset(load_part(n->reset + o, count)),
        syn_decay(n->syn_decay ? load_part(n->syn_decay + o, count) : vf{}),
        syn_gain(n->syn_decay ? load_part(n->syn_gain + o, count) : vf{}) {}

  vi fires(const snm_neuron *n, vf v) const {
    return n->inclusive ? reinterpret_cast<vi>(v >= threshold)
                        : reinterpret_cast<vi>(v > threshold);
  }

  vi step(const snm_neuron *n, vf x, vf &v, vf &current) const {
    if (n->syn_decay) {
      const vf next = current * syn_decay + x * syn_gain;
      x = n->undecayed ? current + x : next;
      current = next;
    }
    const vi late = n->timing ? fires(n, v) : vi{};
    if (n->timing && n->kind == 1) v = select(late, reset, v);
    vf h = v * decay + x * gain + drive;
    if (n->timing && n->kind == 0) h -= select(late, reset, vf{});
    const vi spike = fires(n, h);
    if (!n->timing && n->kind == 1) h = select(spike, reset, h);
    if (n->timing != 1 && n->kind == 0) h -= select(spike, reset, vf{});
    if (n->timing == 2 && n->kind == 0) h += select(late, reset, vf{});
    v = h;
    return spike;
  }

  // The same of a rule that `of_usual` takes, whose choices are known when this is compiled.
  template <class Usual>
  vi step_as(Usual, vf x, vf &v) const {
    const vf h = v * decay + x * gain + drive;
    const vi spike = reinterpret_cast<vi>(Usual::inclusive ? h >= threshold : h > threshold);
    v = Usual::sets ? select(spike, reset, h) : h - select(spike, reset, vf{});
    return spike;
  }
};

template <bool kSets, bool kInclusive>
struct UsualRule {
  static constexpr bool sets = kSets, inclusive = kInclusive;
};

// One membrane and no synapse, reset in the step of the spike: with(UsualRule) for such a rule.
template <class With>
SNM_INLINE bool of_usual(const snm_neuron *n, With with) {
  if (n->timing || n->syn_decay || n->kind > 1) return false;
  if (n->kind)
    n->inclusive ? with(UsualRule<true, true>{}) : with(UsualRule<true, false>{});
  else
    n->inclusive ? with(UsualRule<false, true>{}) : with(UsualRule<false, false>{});
  return true;
}

template <bool kChannelMajor>
struct Epilogue {
  const snm_call *call;
  Tokens tokens;
  int64_t channels;  // of all groups
  alignas(64) float block[VW * VW];

  explicit Epilogue(const snm_call *c)
      : call(c), tokens(c->geometry), channels(c->geometry->groups * c->geometry->og) {}

  // VW pixels x VW channels, pixel by pixel; the result is valid until the next call.
  const float *fetch(const Sums &s, int64_t step, int64_t p, int64_t o, int64_t &stride) {
    if constexpr (kChannelMajor) {
      const int64_t tile = (step * s.pixels + p) / TILE;
      transpose(s.y + (tile * s.stride + o) * TILE + p % TILE, TILE, block, VW);
      stride = VW;
      return block;
    }
    stride = s.stride;
    return s.y + s.row(step, p) * s.stride + o;
  }

  // Sums in scratch are padded to whole vectors; those of another producer are not.
  vf load_sums(const float *y, int64_t n) const {
    return kChannelMajor ? load(y) : load_part(y, n);
  }

  vf scaled(vf y, vf scale, vf bias) const { return call->scale ? y * scale + bias : y + bias; }

  vf bias_of(int64_t oc, int64_t n) const {
    return call->bias ? load_part(call->bias + oc, n) : vf{};
  }
  vf scale_of(int64_t oc, int64_t n) const {
    return call->scale ? load_part(call->scale + oc, n) : vf{};
  }

  void finish(const Sums &s, int64_t first_channel) {
    const int64_t there = least(least(s.pixels, s.count), tokens.pixels - s.p0);
    if (call->neuron)
      neuron(s, first_channel, there);
    else if (!call->out_channels_first)
      rows(s, first_channel, there);
    else
      planes(s, first_channel, there);
  }

  // out[token][channel]
  void rows(const Sums &s, int64_t first, int64_t there) {
    for (int64_t t = 0; t < tokens.g->steps; ++t)
      for (int64_t p = 0; p < there; p += VW)
        for (int64_t o = 0; o < s.outputs; o += VW) {
          const int64_t n = least(VW, s.outputs - o), oc = first + o;
          const vf bias = bias_of(oc, n), scale = scale_of(oc, n);
          int64_t stride;
          const float *y = fetch(s, t, p, o, stride);
          for (int64_t q = 0; q < least(VW, there - p); ++q)
            store_part(call->out + tokens.token(t, s.p0 + p + q) * channels + oc,
                       scaled(loadu(y + q * stride), scale, bias), n);
        }
  }

  // out[image][channel][pixel]
  void planes(const Sums &s, int64_t first, int64_t there) {
    const int64_t area = tokens.g->oh * tokens.g->ow;
    for (int64_t t = 0; t < tokens.g->steps; ++t)
      for (int64_t o = 0; o < s.outputs; o += kChannelMajor ? 1 : VW)
        for (int64_t p = 0; p < there;) {
          const int64_t image = (s.p0 + p) / area, at = (s.p0 + p) % area;
          const int64_t place =
              t * tokens.g->step_stride + image * tokens.g->image_stride;
          float *out = call->out + (place * channels + first + o) * area + at;
          if constexpr (kChannelMajor) {
            const int64_t n = least(least(TILE - p % TILE, there - p), area - at);
            plane_run(s, t, p, o, first + o, n, out);
            p += n;
          } else {
            const int64_t n = least(least(VW, there - p), area - at);
            const int64_t no = least(VW, s.outputs - o);
            const vf bias = bias_of(first + o, no), scale = scale_of(first + o, no);
            alignas(64) float turned[VW * VW], done[VW * VW];
            int64_t stride;
            const float *y = fetch(s, t, p, o, stride);
            for (int64_t q = 0; q < n; ++q)
              store(done + q * VW, scaled(loadu(y + q * stride), scale, bias));
            for (int64_t q = n; q < VW; ++q) store(done + q * VW, vf{});
            transpose(done, VW, turned, VW);
            for (int64_t j = 0; j < no; ++j) store_part(out + j * area, load(turned + j * VW), n);
            p += n;
          }
        }
  }

  void plane_run(const Sums &s, int64_t t, int64_t p, int64_t o, int64_t oc, int64_t n,
                 float *out) {
    const float *y = s.y + ((t * s.pixels + p) / TILE * s.stride + o) * TILE + p % TILE;
    const vf bias = splat(call->bias ? call->bias[oc] : 0.0f);
    const vf scale = splat(call->scale ? call->scale[oc] : 0.0f);
    for (int64_t i = 0; i < n; i += VW)
      store_part(out + i, scaled(load_part(y + i, n - i), scale, bias), n - i);
  }

  // The neuron over all steps, its state in registers; spikes leave as bits, floats or both.
  void neuron(const Sums &s, int64_t first, int64_t there) {
    const int64_t words = ceil_div(channels, 64), steps = tokens.g->steps;
    uint64_t *fired = static_cast<uint64_t *>(snm_scratch(4, sizeof(uint64_t) * steps * VW));
    for (int64_t o64 = 0; o64 < s.outputs; o64 += 64)
      for (int64_t p = 0; p < there; p += VW) {
        const int64_t near = least(VW, there - p);
        memset(fired, 0, sizeof(uint64_t) * steps * VW);
        for (int64_t o = o64; o < least(o64 + 64, s.outputs); o += VW)
          neuron_block(s, first, p, near, o, fired);
        if (call->out_bits)
          for (int64_t t = 0; t < steps; ++t)
            for (int64_t q = 0; q < near; ++q)
              call->out_bits[tokens.token(t, s.p0 + p + q) * words + (first + o64) / 64] =
                  fired[t * VW + q];
      }
  }

  void neuron_block(const Sums &s, int64_t first, int64_t p, int64_t near, int64_t o,
                    uint64_t *fired) {
    const snm_neuron *n = call->neuron;
    const int64_t oc = first + o, count = least(VW, s.outputs - o);
    const vf bias = bias_of(oc, count), scale = scale_of(oc, count);
    const NeuronLanes lanes_of(n, oc, count);
    vf v[VW], current[VW];
    for (int64_t q = 0; q < near; ++q) {
      const int64_t at = (s.p0 + p + q) * channels + oc;
      v[q] = load_part(n->v + at, count);
      current[q] = n->syn_decay ? load_part(n->current + at, count) : vf{};
    }
    for (int64_t t = 0; t < tokens.g->steps; ++t) {
      int64_t stride;
      const float *y = fetch(s, t, p, o, stride);
      for (int64_t q = 0; q < near; ++q) {
        const vf x = scaled(load_sums(y + q * stride, count), scale, bias);
        const vi spike = lanes_of.step(n, x, v[q], current[q]);
        const uint64_t bits = lanes(spike) & ((1u << count) - 1);
        fired[t * VW + q] |= bits << (o % 64);
        if (call->out)
          store_part(call->out + tokens.token(t, s.p0 + p + q) * channels + oc,
                     select(spike, splat(1.0f), vf{}), count);
      }
    }
    for (int64_t q = 0; q < near; ++q) {
      const int64_t at = (s.p0 + p + q) * channels + oc;
      store_part(n->v + at, v[q], count);
      if (n->syn_decay) store_part(n->current + at, current[q], count);
    }
  }
};

// The neuron alone, on sums that something else has computed, max-pooled on the way where the
// geometry has a window.  kind 1: the input is one step, the same at all steps.
struct Integrate {
  static constexpr int64_t kPixels = 64;
  const snm_call *call;
  Tokens tokens;
  int64_t channels, given;  // steps of the input
  bool pooled;

  explicit Integrate(const snm_call *c)
      : call(c),
        tokens(c->geometry),
        channels(c->geometry->groups * c->geometry->og),
        given(c->kind == 1 ? 1 : c->geometry->steps),
        pooled(c->geometry->h * c->geometry->w * c->geometry->kh * c->geometry->kw != 1) {}

  static void item(void *self, int64_t index) {
    static_cast<const Integrate *>(self)->run(index * kPixels);
  }

  void run(int64_t p0) const {
    const int64_t pixels = pooled ? kPixels : tokens.pixels;
    const float *y = pooled ? pool(p0) : static_cast<const float *>(call->input) + p0 * channels;
    Epilogue<false>(call).finish(
        {y, channels, 0, channels, p0, pixels, kPixels, given == 1 ? 0 : pixels}, 0);
  }

  // [step][pixel][channel] of kPixels pixels from p0.
  const float *pool(int64_t p0) const {
    const snm_geometry *g = call->geometry;
    float *y = static_cast<float *>(snm_scratch(0, sizeof(float) * given * kPixels * channels));
    float *outside = static_cast<float *>(snm_scratch(1, sizeof(float) * channels));
    for (int64_t c = 0; c < channels; ++c) outside[c] = -__builtin_inff();
    const uint8_t *rows[kPixels];
    for (int64_t t = 0; t < given; ++t)
      for (int64_t tap = 0; tap < g->kh * g->kw; ++tap) {
        tokens.rows(static_cast<const uint8_t *>(call->input), channels * sizeof(float),
                    reinterpret_cast<const uint8_t *>(outside), t, tap, p0, kPixels, rows);
        for (int64_t i = 0; i < kPixels; ++i)
          largest(reinterpret_cast<const float *>(rows[i]), y + (t * kPixels + i) * channels, tap);
      }
    return y;
  }

  void largest(const float *row, float *y, int64_t tap) const {
    for (int64_t c = 0; c < channels; ++c) {
      const bool take = !tap || row[c] > y[c] || row[c] != row[c];  // NaN stays
      y[c] = take ? row[c] : y[c];
    }
  }
};

int32_t integrate(const snm_call *call) {
  const snm_geometry *g = call->geometry;
  if (!call->neuron || g->image_stride != 1) return -1;
  Integrate self(call);
  snm_parallel(ceil_div(self.tokens.pixels, Integrate::kPixels), call->threads, Integrate::item,
               &self);
  return 0;
}

}  // namespace
