// SPDX-License-Identifier: Apache-2.0
// What lies between the layers of a network, token by token: neurons, pools, joins, reductions.
#pragma once
#include "epilogue.h"
#include "stream.h"

namespace {

SNM_INLINE bool fires_at(const uint64_t *bits, int64_t i) { return bits[i / 64] >> (i % 64) & 1; }
SNM_INLINE void set_bit(uint64_t *bits, int64_t i) { bits[i / 64] |= 1ull << (i % 64); }

// The low VW bits as floats.
SNM_INLINE vf ones_of(uint32_t bits) {
  vi lane;
  for (int k = 0; k < VW; ++k) lane[k] = 1 << k;
  const vi word = vi{} + static_cast<int32_t>(bits);
  return select((word & lane) == lane, splat(1.0f), vf{});
}

// A token as floats; bits are spread into `room`, 64 numbers a word.
SNM_INLINE const float *as_floats(const NetValue *v, const void *token, float *room) {
  if (!v->bits) return static_cast<const float *>(token);
  const uint64_t *bits = static_cast<const uint64_t *>(token);
  for (int64_t i = 0; i < ceil_div(v->size, 64) * 64; i += VW)
    storeu(room + i, ones_of(static_cast<uint32_t>(bits[i / 64] >> (i % 64))));
  return room;
}

// ---- neurons ------------------------------------------------------------------------------------

// One neuron over all steps of one image.
struct NetNeuron {
  const NetOp *op;
  const NetValue *in, *out, *shown;
  snm_neuron rule;
  int64_t emits;

  NetNeuron(const NetOp *o, const NetValue *values)
      : op(o), in(values + o->word[kIn0]), out(values + o->word[kOut0]),
        shown(o->word[kOut1] == kNoValue ? nullptr : values + o->word[kOut1]) {
    const float *p = o->memory;
    const int64_t n = o->wide;
    const int64_t synapse = o->word[kNeuronSynapse];
    rule = {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, nullptr,
            synapse ? p + 5 * n : nullptr, synapse ? p + 6 * n : nullptr, nullptr,
            static_cast<int32_t>(o->word[kNeuronReset]),
            static_cast<int32_t>(o->word[kNeuronTiming]),
            static_cast<int32_t>(o->word[kNeuronInclusive]), synapse == 2};
    emits = o->word[kNeuronEmits];
  }

  void run(const NetRun *r, int64_t image, float *v, float *current) const {
    const bool alike = op->wide == kLanesMost;
    const NeuronLanes same(&rule, 0, VW);
    const bool only_spikes = emits == kSpikes && !shown && !op->floor && alike;
    if (only_spikes && of_usual(&rule, [&](auto usual) {
          walk(r, image, [&](vf x, int64_t i, int64_t) {
            vf now = loadu(v + i);
            const uint32_t fires = lanes(same.step_as(usual, x, now));
            storeu(v + i, now);
            return fires;
          });
        }))
      return;
    walk(r, image, [&](vf x, int64_t i, int64_t token) {
      const NeuronLanes own = alike ? same : NeuronLanes(&rule, i, VW);
      vf now = loadu(v + i), syn = rule.syn_decay ? loadu(current + i) : vf{};
      uint32_t fires = 0;
      if (emits == kSpikes)
        fires = lanes(own.step(&rule, x, now, syn));
      else
        storeu(token_of<float>(r, op->word[kOut0], out, token) + i, emitted(own, x, now, syn));
      if (op->floor) now = raised(now, load(op->floor + (alike ? 0 : i)));
      storeu(v + i, now);
      if (rule.syn_decay) storeu(current + i, syn);
      if (shown) storeu(token_of<float>(r, op->word[kOut1], shown, token) + i, now);
      return fires;
    });
  }

  // All steps of 64 numbers after each other, whose state is in L1 meanwhile. step(x, i, token)
  // takes the VW numbers from i on through one step, and gives the lanes that fire.
  template <class Step>
  void walk(const NetRun *r, int64_t image, const Step &step) const {
    const int64_t steps = out->timed ? r->steps : 1;
    for (int64_t i = 0; i < out->size; i += 64) {
      const int64_t count = least(64, out->size - i);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t token = t * r->images + image;
        const float *x = token_of<float>(r, op->word[kIn0], in, in->timed ? token : image) + i;
        uint64_t word = 0;
        for (int64_t j = 0; j < count; j += VW)
          word |= static_cast<uint64_t>(step(loadu(x + j), i + j, token)) << j;
        if (emits != kSpikes) continue;
        if (count < 64) word &= (1ull << count) - 1;
        token_of<uint64_t>(r, op->word[kOut0], out, token)[i / 64] = word;
      }
    }
  }

  // What a neuron gives that does not give spikes: its membrane, or how often it fires at once.
  vf emitted(const NeuronLanes &own, vf x, vf &v, vf &current) const {
    if (rule.syn_decay) {
      const vf next = current * own.syn_decay + x * own.syn_gain;
      x = rule.undecayed ? current + x : next;
      current = next;
    }
    v = v * own.decay + x * own.gain + own.drive;
    return emits == kMembrane ? v : counted(own, v);
  }

  // max(v, floor), rounded as sinabs does.
  static vf raised(vf v, vf floor) {
    const vf over = v - floor;
    return select(reinterpret_cast<vi>(over < vf{}), vf{}, over) + floor;  // NaN stays
  }

  // As many spikes as thresholds fit into the membrane; the reset takes each of them off.
  vf counted(const NeuronLanes &own, vf &v) const {
    vf count = v / own.threshold;
    for (int k = 0; k < VW; ++k) count[k] = count[k] > 0 ? __builtin_truncf(count[k]) : 0.0f;
    if (rule.kind == 0) v -= count * own.reset;
    if (rule.kind == 1) v = (splat(1.0f) - count) * v + count * own.reset;
    return count;
  }

  template <class T>
  static T *token_of(const NetRun *r, int64_t value, const NetValue *v, int64_t token) {
    return static_cast<T *>(r->memory[value]) + token * v->stride;
  }
};

// ---- pools --------------------------------------------------------------------------------------

struct NetPoolOp {
  const NetOp *op;
  const NetValue *in, *out;
  int64_t mode, kh, kw, sh, sw, ph, pw, dh, dw;

  NetPoolOp(const NetOp *o, const NetValue *values)
      : op(o), in(values + o->word[kIn0]), out(values + o->word[kOut0]) {
    const int64_t *w = o->word;
    mode = w[kPoolMode];
    kh = w[kPoolKernel], kw = w[kPoolKernel + 1], sh = w[kPoolStride], sw = w[kPoolStride + 1];
    ph = w[kPoolPadding], pw = w[kPoolPadding + 1];
    dh = w[kPoolDilation], dw = w[kPoolDilation + 1];
  }

  bool largest() const { return mode == kMax || mode == kAdaptiveMax; }

  // First and one past the last position of an output's window, stepping by the dilation.
  void window(int64_t o, int64_t size, int64_t outs, int64_t k, int64_t s, int64_t p, int64_t d,
              int64_t *from, int64_t *to) const {
    if (mode == kAdaptiveMax || mode == kAdaptiveAverage) {
      *from = o * size / outs;
      *to = ((o + 1) * size + outs - 1) / outs;
      return;
    }
    *from = o * s - p;
    *to = least(*from + (k - 1) * d + 1, size);
    if (*from < 0) *from += (-*from + d - 1) / d * d;
  }

  // Of spikes the largest is whether any fires: each sets its bit in the windows that hold it.
  void spikes(const uint64_t *x, uint64_t *y, Events *e) const {
    if (in->c % 64 == 0) return words(x, y);
    memset(y, 0, sizeof(uint64_t) * static_cast<size_t>(out->stride));
    events_of_bits(x, in->size, e);
    for (int64_t k = 0; k < e->count; ++k) {
      const int64_t pixel = e->index[k] / in->c, c = e->index[k] % in->c;
      const int64_t iy = pixel / in->w, ix = pixel % in->w;
      for (int64_t oy = first(iy, kh, sh, ph, dh); oy < out->h && oy * sh - ph <= iy; ++oy) {
        if ((iy - oy * sh + ph) % dh) continue;
        for (int64_t ox = first(ix, kw, sw, pw, dw); ox < out->w && ox * sw - pw <= ix; ++ox)
          if ((ix - ox * sw + pw) % dw == 0) set_bit(y, (oy * out->w + ox) * out->c + c);
      }
    }
  }

  // Of pixels that are whole words, 64 channels at a time.
  void words(const uint64_t *x, uint64_t *y) const {
    const int64_t n = in->c / 64;
    for (int64_t oy = 0; oy < out->h; ++oy)
      for (int64_t ox = 0; ox < out->w; ++ox, y += n) {
        int64_t y0, y1, x0, x1;
        window(oy, in->h, out->h, kh, sh, ph, dh, &y0, &y1);
        window(ox, in->w, out->w, kw, sw, pw, dw, &x0, &x1);
        for (int64_t k = 0; k < n; ++k) {
          uint64_t any = 0;
          for (int64_t iy = y0; iy < y1; iy += dh)
            for (int64_t ix = x0; ix < x1; ix += dw) any |= x[(iy * in->w + ix) * n + k];
          y[k] = any;
        }
      }
  }

  static int64_t first(int64_t i, int64_t k, int64_t s, int64_t p, int64_t d) {
    return most(0, ceil_div(i + p - (k - 1) * d, s));
  }

  // Windows that lie within the image, side by side without gaps.
  bool plain() const {
    return mode == kMax && dh == 1 && dw == 1 && ph == 0 && pw == 0 &&
           (out->h - 1) * sh + kh <= in->h && (out->w - 1) * sw + kw <= in->w;
  }

  void largest_of_plain(const float *x, float *y) const {
    const int64_t c = in->c, line = in->w * c;
    for (int64_t oy = 0; oy < out->h; ++oy)
      for (int64_t ox = 0; ox < out->w; ++ox, y += c) {
        const float *corner = x + oy * sh * line + ox * sw * c;
        for (int64_t o = 0; o < c; o += VW) {
          vf top = loadu(corner + o);
          for (int64_t ky = 0; ky < kh; ++ky)
            for (int64_t kx = 0; kx < kw; ++kx)
              top = larger(loadu(corner + ky * line + kx * c + o), top);
          storeu(y + o, top);  // runs over into the next pixel, which is written after
        }
      }
  }

  // NaN stays, as in torch.
  static vf larger(vf v, vf than) {
    return select(reinterpret_cast<vi>(v > than) | ~reinterpret_cast<vi>(v == v), v, than);
  }

  void floats(const float *x, float *y) const {
    if (plain()) return largest_of_plain(x, y);
    for (int64_t oy = 0; oy < out->h; ++oy)
      for (int64_t ox = 0; ox < out->w; ++ox) {
        int64_t y0, y1, x0, x1;
        window(oy, in->h, out->h, kh, sh, ph, dh, &y0, &y1);
        window(ox, in->w, out->w, kw, sw, pw, dw, &x0, &x1);
        const float share = largest() ? 1.0f : 1.0f / divisor(oy, ox, (y1 - y0) * (x1 - x0));
        pool(x, y + (oy * out->w + ox) * out->c, y0, y1, x0, x1, share);
      }
  }

  float divisor(int64_t oy, int64_t ox, int64_t inside) const {
    const int64_t *w = op->word;
    if (mode == kAdaptiveAverage) return static_cast<float>(inside);
    if (w[kPoolDivisor]) return static_cast<float>(w[kPoolDivisor]);
    if (!w[kPoolCountsPadding]) return static_cast<float>(inside);
    // Windows that reach beyond the padding (ceil_mode) count what lies within it.
    const int64_t rows = least(oy * sh - ph + kh, in->h + ph) - (oy * sh - ph);
    const int64_t columns = least(ox * sw - pw + kw, in->w + pw) - (ox * sw - pw);
    return static_cast<float>(rows * columns);
  }

  void pool(const float *x, float *y, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
            float share) const {
    for (int64_t c = 0; c < out->c; c += VW) {
      vf sum = largest() ? splat(-__builtin_inff()) : vf{};
      for (int64_t iy = y0; iy < y1; iy += mode == kMax ? dh : 1)
        for (int64_t ix = x0; ix < x1; ix += mode == kMax ? dw : 1) {
          const vf v = loadu(x + (iy * in->w + ix) * in->c + c);
          sum = largest() ? larger(v, sum) : sum + v;
        }
      if (!largest()) sum = sum * splat(share);
      storeu(y + c, sum);  // runs over into the next pixel, which is written after
    }
  }
};

// ---- one number at a time -----------------------------------------------------------------------

SNM_INLINE vf joined(int64_t mode, vf a, vf b) {
  if (mode == kAdd) return a + b;
  if (mode == kSub) return a - b;
  if (mode == kMul) return a * b;
  return (splat(1.0f) - a) * b;  // SEW's "iand"
}

}  // namespace

#include "net_strided.h"

namespace {

SNM_INLINE void join(int64_t mode, const float *a, const float *b, float *y, int64_t size) {
  for (int64_t i = 0; i < size; i += VW) storeu(y + i, joined(mode, loadu(a + i), loadu(b + i)));
}

SNM_INLINE void affine(const NetOp *op, const float *x, float *y, int64_t size) {
  const float *shift = op->memory + op->wide;
  const bool alike = op->wide == kLanesMost;
  for (int64_t i = 0; i < size; i += VW) {
    const int64_t at = alike ? 0 : i;
    storeu(y + i, loadu(x + i) * loadu(op->memory + at) + loadu(shift + at));
  }
}

SNM_INLINE bool all_finite(const float *x, int64_t size) {
  vf poison = {};
  int64_t i = 0;
  for (; i + VW <= size; i += VW) poison += loadu(x + i) * vf{};
  float rest = 0.0f;
  for (int k = 0; k < VW; ++k) rest += poison[k];
  for (; i < size; ++i) rest += x[i] * 0.0f;
  return rest == 0.0f;
}

SNM_INLINE void relu(const float *x, float *y, int64_t size) {
  for (int64_t i = 0; i < size; i += VW) {
    const vf v = loadu(x + i);
    storeu(y + i, select(reinterpret_cast<vi>(v < vf{}), vf{}, v));  // NaN stays
  }
}

// Channels of b behind those of a, pixel by pixel.
SNM_INLINE void concatenate(const float *a, const float *b, float *y, const NetValue *av,
                            const NetValue *bv) {
  for (int64_t p = 0; p < av->h * av->w; ++p) {
    memcpy(y, a + p * av->c, sizeof(float) * static_cast<size_t>(av->c));
    memcpy(y + av->c, b + p * bv->c, sizeof(float) * static_cast<size_t>(bv->c));
    y += av->c + bv->c;
  }
}

SNM_INLINE void concatenate_bits(const uint64_t *a, const uint64_t *b, uint64_t *y,
                                 const NetValue *av, const NetValue *bv, const NetValue *yv,
                                 Events *e) {
  memset(y, 0, sizeof(uint64_t) * static_cast<size_t>(yv->stride));
  events_of_bits(a, av->size, e);
  for (int64_t k = 0; k < e->count; ++k)
    set_bit(y, e->index[k] / av->c * yv->c + e->index[k] % av->c);
  events_of_bits(b, bv->size, e);
  for (int64_t k = 0; k < e->count; ++k)
    set_bit(y, e->index[k] / bv->c * yv->c + av->c + e->index[k] % bv->c);
}

}  // namespace
