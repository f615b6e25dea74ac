// SPDX-License-Identifier: Apache-2.0
// Runs the operations of a network one after another; each covers all its time steps and images.
// Compiled once per ISA level with SNM_NET_RUN naming the result.
#include "gather.h"
#include "net_ops.h"
#include "net_pointwise.h"

namespace {

constexpr int64_t kWorthThreads = 1 << 17;  // multiply-adds below which one thread is faster

// One operation, cut into items that write apart from each other.
struct NetStep {
  const NetRun *run;
  const NetOp *op;
  bool with_neuron = false;  // and the next operation, see NetOp
  int64_t parts = 1;  // of a layer's outputs, where there are too few tokens to share out

  const NetValue *value(int which) const { return run->values + op->word[which]; }

  int64_t tokens_of(const NetValue *v) const { return run->images * (v->timed ? run->steps : 1); }

  // Token of an operand: one without time is the same in every step.
  const void *in(int which, int64_t token) const {
    const NetValue *v = value(which);
    const int64_t at = v->timed ? token : token % run->images;
    const char *memory = static_cast<const char *>(run->memory[op->word[which]]);
    return memory + at * v->stride * (v->bits ? sizeof(uint64_t) : sizeof(float));
  }

  void *out(int64_t token) const { return const_cast<void *>(in(kOut0, token)); }

  const float *floats(int which, int64_t token, int slot) const {
    const NetValue *v = value(which);
    if (!v->bits) return static_cast<const float *>(in(which, token));
    const size_t bytes = sizeof(float) * static_cast<size_t>(v->size + 128);
    return as_floats(v, in(which, token), static_cast<float *>(snm_scratch(slot, bytes)));
  }

  static void item(void *self, int64_t index) { static_cast<const NetStep *>(self)->one(index); }

  void one(int64_t index) const {
    if (op->word[kCode] == kStore) return store_state(index);
    float *y = static_cast<float *>(op->word[kCode] == kNeuron ? nullptr : out(index / parts));
    const NetValue *to = value(kOut0);
    switch (op->word[kCode]) {
      case kLayer: return layer(index / parts, index % parts);
      case kNeuron: return neuron(index);
      case kPool: return pool(index);
      case kJoin:
        return join(op->word[kMode], floats(kIn0, index, 0), floats(kIn1, index, 1), y, to->size);
      case kAffine: return affine(op, floats(kIn0, index, 0), y, to->size);
      case kRelu: return relu(floats(kIn0, index, 0), y, to->size);
      case kConcat: return concat(index);
      case kStrided: return strided(index, y);
      case kNorm: return normalize(op, to, floats(kIn0, index, 0), y);
      case kReduce: return reduce(index);
      case kSteps: return cut(index, y);
      case kRecall: {
        memcpy(y, state(index), bytes_of_state(to));
        return;
      }
      case kCompare:
        return compare(op, floats(kIn0, index, 0), static_cast<uint64_t *>(out(index)), to->size);
      case kPointwise: return pointwise(op->word[kMode], floats(kIn0, index, 0), y, to->size);
      case kSoftmax: return softmax(op->word, floats(kIn0, index, 0), y, to->size);
      default: return;
    }
  }

  // What a step stores for the next one: one image's token, floats or bits.
  void *state(int64_t image) const {
    return run->states[op->word[kRecallState]] + image * op->state_stride;
  }

  static size_t bytes_of_state(const NetValue *v) {
    return static_cast<size_t>(v->stride) * (v->bits ? sizeof(uint64_t) : sizeof(float));
  }

  void store_state(int64_t image) const {
    memcpy(state(image), in(kIn0, image), bytes_of_state(value(kIn0)));
  }

  void layer(int64_t token, int64_t part) const {
    const StreamLayer layer(op, run->values);
    const Events e = events_of(layer.in, in(kIn0, token));
    const int64_t rows = layer.out->h * layer.out->w * layer.row;
    // Outputs that need no padding are summed up where they belong.
    const bool direct = layer.row == layer.out->c;
    float *y = direct ? static_cast<float *>(out(token))
                      : static_cast<float *>(
                            snm_scratch(0, sizeof(float) * static_cast<size_t>(rows)));
    if (parts == 1) {
      layer.sums(e, y, 0, op->group_stride);
      return layer.finish(y, static_cast<float *>(out(token)));
    }
    // A slice of the outputs of a layer of one group, whose rows need no padding.
    const int64_t width = slice(), from = part * width, to = least(from + width, layer.out->c);
    layer.sums(e, y, from, to - from);
    for (int64_t p = 0; p < layer.out->h * layer.out->w; ++p)
      for (int64_t o = from; o < to; o += VW)
        store(y + p * layer.row + o, load(y + p * layer.row + o) + load(op->bias + o));
  }

  int64_t slice() const { return ceil_div(ceil_div(op->group_stride, parts), 16) * 16; }

  void neuron(int64_t image) const {
    const NetNeuron neuron(op, run->values);
    float *v = run->states[op->word[kNeuronState]] + image * op->state_stride;
    neuron.run(run, image, v, v + run->state_images * op->state_stride);
  }

  void pool(int64_t token) const {
    const NetPoolOp pool(op, run->values);
    if (value(kOut0)->bits) {
      Events e = event_room(pool.in->size);
      return pool.spikes(static_cast<const uint64_t *>(in(kIn0, token)),
                         static_cast<uint64_t *>(out(token)), &e);
    }
    pool.floats(floats(kIn0, token, 0), static_cast<float *>(out(token)));
  }

  void strided(int64_t token, float *y) const {
    memset(y, 0, sizeof(float) * static_cast<size_t>(value(kOut0)->stride));
    const int64_t offset = op->word[kStridedOffset];
    const bool copies = op->word[kMode] == kCopy, multiplies = op->word[kMode] == kMul;
    const Strided plain(op->word, false, false);
    if (copies && value(kIn0)->bits && plain.copies_runs())
      return plain.copy_bits(0, static_cast<const uint64_t *>(in(kIn0, token)), offset, y);
    const float *x = floats(kIn0, token, 0), *z = copies ? x : floats(kIn1, token, 1);
    const bool finite[2] = {multiplies && all_finite(x, value(kIn0)->size),
                            multiplies && all_finite(z, value(kIn1)->size)};
    Strided(op->word, finite[0], finite[1]).run(x + offset, z, y);
  }

  void concat(int64_t token) const {
    const NetValue *a = value(kIn0), *b = value(kIn1);
    if (value(kOut0)->bits) {
      Events e = event_room(most(a->size, b->size));
      return concatenate_bits(static_cast<const uint64_t *>(in(kIn0, token)),
                              static_cast<const uint64_t *>(in(kIn1, token)),
                              static_cast<uint64_t *>(out(token)), a, b, value(kOut0), &e);
    }
    concatenate(floats(kIn0, token, 0), floats(kIn1, token, 1), static_cast<float *>(out(token)),
                a, b);
  }

  // One step of those that lie behind each other in a token.
  void cut(int64_t token, float *y) const {
    const int64_t size = value(kOut0)->size;
    const float *x = floats(kIn0, token % run->images, 0) + token / run->images * size;
    memcpy(y, x, sizeof(float) * static_cast<size_t>(size));
  }

  // Over time: item by item of the batch.
  void reduce(int64_t image) const {
    const NetValue *to = value(kOut0);
    float *y = static_cast<float *>(out(image));
    const int64_t mode = op->word[kMode], first = mode == kLast ? run->steps - 1 : 0;
    for (int64_t t = first; t < run->steps; ++t) {
      const float *x = floats(kIn0, t * run->images + image, 0);
      for (int64_t i = 0; i < to->size; i += VW)
        storeu(y + i, t == first ? loadu(x + i) : loadu(y + i) + loadu(x + i));
    }
    if (mode != kMean) return;
    const vf steps = splat(static_cast<float>(run->steps));
    for (int64_t i = 0; i < to->size; i += VW) storeu(y + i, loadu(y + i) / steps);
  }

  void start() {
    const bool by_image = op->word[kCode] == kNeuron || op->word[kCode] == kReduce;
    // What recalls reads no value, and what stores gives none.
    const NetValue *to = value(op->word[kCode] == kStore ? kIn0 : kOut0);
    const NetValue *from = op->word[kCode] == kRecall ? to : value(kIn0);
    int64_t items = by_image ? run->images : tokens_of(to);
    int64_t work = items * (by_image ? run->steps : 1) * most(from->size, to->size);
    if (op->word[kCode] == kLayer) work *= most(1, op->taps * op->group_outputs / 8);
    if (op->word[kCode] == kStrided)
      for (int64_t i = 0; i < op->word[kStridedCount]; ++i)
        if (!op->word[kStridedLoop + 4 * i + 1]) work *= op->word[kStridedLoop + 4 * i];
    const int64_t threads = work < kWorthThreads ? 1 : run->threads;
    if (op->word[kCode] == kLayer && op->form == kTapRows)
      return GatherLayer(run, op, with_neuron ? op + 1 : nullptr).start(threads);
    const bool sliced = op->word[kCode] == kLayer && items < threads &&
                        op->word[kLayerGroups] == 1 && op->group_outputs == op->group_stride;
    if (sliced) {
      parts = least(threads, op->group_stride / 16);
      parts = ceil_div(op->group_stride, slice());
    }
    snm_parallel(items * parts, threads, item, this);
  }
};

void run_all(const NetRun *run, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    const NetOp *op = run->ops + i;
    // Who observes sees what every operation gives.
    const bool two = op->with_neuron && !run->observe && i + 1 < to;
    NetStep step{run, op, two};
    step.start();
    i += two;
    if (!run->observe) continue;
    const bool reads = op->word[kCode] != kRecall, gives = op->word[kCode] != kStore;
    run->observe(run->context, i, reads ? run->memory[op->word[kIn0]] : nullptr,
                 gives ? run->memory[op->word[kOut0]] : nullptr);
  }
}

// One step after another: each sees only its own tokens of values over time.
void run_loop(const NetRun *run, const NetLoop &loop) {
  NetRun one = *run;
  one.steps = 1, one.memory = run->shifted;
  for (int64_t v = 0; v < run->n_values; ++v) run->shifted[v] = run->memory[v];
  for (int64_t t = 0; t < (loop.timed ? run->steps : 1); ++t) {
    run_all(&one, loop.from, loop.to);
    for (int64_t v = 0; v < run->n_values; ++v) {
      const NetValue &value = run->values[v];
      const int64_t bytes = value.stride * static_cast<int64_t>(value.bits ? 8 : 4);
      if (value.timed)
        run->shifted[v] = static_cast<char *>(run->shifted[v]) + run->images * bytes;
    }
  }
}

}  // namespace

extern "C" int32_t SNM_NET_RUN(const NetRun *run) {
  int64_t at = 0;
  for (int64_t k = 0; k < run->n_loops; ++k) {
    run_all(run, at, run->loops[k].from);
    run_loop(run, run->loops[k]);
    at = run->loops[k].to;
  }
  run_all(run, at, run->n_ops);
  return 0;
}
