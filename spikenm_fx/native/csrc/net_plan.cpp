// SPDX-License-Identifier: Apache-2.0
#include "net_plan.h"

#include <algorithm>
#include <cstring>

namespace {

struct Place {
  int64_t from, to, last_use;
};

int64_t bytes_of(const NetValue &v, int64_t steps, int64_t images) {
  int64_t bytes = 0;
  if (__builtin_mul_overflow(images, v.timed ? steps : 1, &bytes) ||
      __builtin_mul_overflow(bytes, v.stride * (v.bits ? 8 : 4), &bytes) || bytes > (1ll << 40))
    return -1;
  return (bytes + 63) / 64 * 64;
}

// A walk over the elements of a tensor, of all images or of one, with their places in the tokens of
// a value.
struct Walk {
  int64_t rank = 0, size[SPIKENM_RANK], stride[SPIKENM_RANK], apart[SPIKENM_RANK];  // apart: in
  int64_t token_stride, first = 0;                                                  // the tensor

  Walk(const NetPort &port, const NetValue &v, const NetSizes &sizes, bool step, bool is_input,
       int64_t image)
      : token_stride(v.stride) {
    int64_t channels = 1, batch_stride[SPIKENM_RANK], images = 1, seen = 0;
    int64_t n_batch = 0;
    for (int64_t i = 0; i < port.rank; ++i) n_batch += port.axes[i].role == kBatch;
    for (int64_t k = n_batch; k-- > 0; images *= sizes.batch[k]) batch_stride[k] = images;
    int64_t of[SPIKENM_RANK];
    for (int64_t i = port.rank; i-- > 0;) {  // the last axis of channels is innermost
      const NetAxis &a = port.axes[i];
      of[i] = a.role == kChannel ? channels : a.role == kWidth ? v.c : v.w * v.c;
      if (a.role == kChannel) channels *= a.size;
    }
    int64_t which[SPIKENM_RANK];
    for (int64_t i = 0; i < port.rank; ++i) {
      const NetAxis &a = port.axes[i];
      if (a.role == kTime && step) continue;
      which[rank] = -1;
      size[rank] = a.size;
      stride[rank] = of[i];
      if (a.role == kTime)
        size[rank] = sizes.steps, stride[rank] = (image < 0 ? sizes.images : 1) * token_stride;
      if (a.role == kBatch) {
        which[rank] = is_input ? seen++ : a.size;
        size[rank] = sizes.batch[which[rank]];
        stride[rank] = batch_stride[which[rank]] * token_stride;
      }
      ++rank;
    }
    int64_t elements = 1;
    for (int64_t i = rank; i-- > 0; elements *= size[i]) apart[i] = elements;
    if (image < 0) return;
    int64_t left = 0;
    for (int64_t i = 0; i < rank; ++i)
      if (which[i] < 0) {
        size[left] = size[i], stride[left] = stride[i], apart[left++] = apart[i];
      } else {
        first += image / batch_stride[which[i]] % size[i] * apart[i];
      }
    rank = left;
  }

  // visit(element of the tensor, place, how many along the last axis); those are `near` in the
  // tensor, and `far` in the value.
  int64_t near() const { return rank ? apart[rank - 1] : 1; }
  int64_t far() const { return rank ? stride[rank - 1] : 1; }

  template <class Visit>
  void run(Visit visit) const {
    int64_t at[SPIKENM_RANK] = {}, element = first, place = 0;
    const int64_t inner = rank ? size[rank - 1] : 1;
    for (int64_t i = 0; i < rank; ++i)
      if (!size[i]) return;
    for (;;) {
      visit(element, place, inner);
      int64_t i = rank - 2;
      for (; i >= 0; --i) {
        place += stride[i], element += apart[i];
        if (++at[i] < size[i]) break;
        place -= at[i] * stride[i], element -= at[i] * apart[i];
        at[i] = 0;
      }
      if (i < 0) return;
    }
  }
};

}  // namespace

bool NetPlan::lay_out(const NetModel &model, NetFailure *fail) {
  const size_t n = model.values.size();
  std::vector<Place> taken;
  std::vector<int64_t> at(n, 0), born(n, -2);
  for (const NetPort &input : model.inputs) born[static_cast<size_t>(input.value)] = -1;
  for (size_t i = 0; i < model.ops.size(); ++i)
    for (int k = kOut0; k <= kOut1; ++k)
      if ((k == kOut0 && model.ops[i].word[kCode] != kStore) ||
          (model.ops[i].word[kCode] == kNeuron && model.ops[i].word[k] != kNoValue))
        born[static_cast<size_t>(model.ops[i].word[k])] = static_cast<int64_t>(i);
  // The first step makes all values of a loop before the second one does.
  for (const NetLoop &loop : model.loops)
    for (int64_t &birth : born)
      if (birth >= loop.from && birth < loop.to) birth = loop.from;
  std::vector<size_t> order;
  for (size_t v = 0; v < n; ++v)
    if (born[v] > -2) order.push_back(v);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return born[a] < born[b]; });
  int64_t whole = 0;
  for (size_t v : order) {
    const int64_t bytes = bytes_of(model.values[v], steps, images);
    if (bytes < 0) return (*fail)("so many steps and images need more memory than there is");
    taken.erase(std::remove_if(taken.begin(), taken.end(),
                               [&](const Place &p) { return p.last_use < born[v]; }),
                taken.end());
    std::sort(taken.begin(), taken.end(),
              [](const Place &a, const Place &b) { return a.from < b.from; });
    int64_t from = 0;
    for (const Place &p : taken) {
      if (from + bytes <= p.from) break;
      from = std::max(from, p.to);
    }
    const int64_t last = std::max(model.last_use[v], born[v]);
    taken.push_back({from, from + bytes, last});
    at[v] = from;
    whole = std::max(whole, from + bytes);
  }
  whole += 256;
  if (__builtin_mul_overflow(whole, copies, &whole) || !arena.take(whole))
    return (*fail)("there is no memory for so many steps and images");
  states.resize(model.states.size() * static_cast<size_t>(copies));
  shifted.resize(n * static_cast<size_t>(copies));
  memory.resize(n * static_cast<size_t>(copies));
  for (size_t i = 0; i < memory.size(); ++i)
    memory[i] = arena.bytes() + static_cast<int64_t>(i / n) * (whole / copies) + at[i % n];
  return true;
}

namespace {

// The sizes that one input's shape asks for.
bool sizes_of(const NetPort &in, const int64_t *shape, int32_t rank, bool step, NetSizes *sizes,
              NetFailure *fail) {
  int64_t wanted = 0, given = 0, batch = 0;
  for (int64_t i = 0; i < in.rank; ++i) wanted += !(step && in.axes[i].role == kTime);
  if (wanted != rank)
    return (*fail)("the input has %d axes; %lld are required%s", rank,
                   static_cast<long long>(wanted), step ? ", without time, in one step" : "");
  for (int64_t i = 0; i < in.rank; ++i) {
    const NetAxis &a = in.axes[i];
    if (step && a.role == kTime) continue;
    const int64_t size = shape[given++];
    if (size < 0 || size > (1ll << 40)) return (*fail)("an axis of the input has no valid size");
    if (a.role == kTime) sizes->steps = size;
    if (a.role == kBatch) {
      sizes->batch[batch++] = size;
      if (__builtin_mul_overflow(sizes->images, size, &sizes->images))
        return (*fail)("the input is too large");
    }
    if (a.role >= kChannel && size != a.size)
      return (*fail)("axis %lld of the input has size %lld; the network was made for %lld: only "
                     "steps and batch may differ, so make an engine from examples of this size",
                     static_cast<long long>(given - 1), static_cast<long long>(size),
                     static_cast<long long>(a.size));
  }
  return true;
}

}  // namespace

bool net_sizes(const NetModel &model, const NetShape *shapes, int32_t count, bool step,
               NetSizes *sizes, NetFailure *fail) {
  if (count != static_cast<int32_t>(model.inputs.size()))
    return (*fail)("it is given %d inputs; the network takes %d", count,
                   static_cast<int>(model.inputs.size()));
  bool timed = false;
  for (int32_t i = 0; i < count; ++i) {
    const NetPort &in = model.inputs[static_cast<size_t>(i)];
    NetSizes own;
    if (!sizes_of(in, shapes[i].size, shapes[i].rank, step, &own, fail)) return false;
    const bool has_time = model.values[static_cast<size_t>(in.value)].timed != 0;
    if (i && own.images != sizes->images)
      return (*fail)("input %d has a batch of %lld, and those before it one of %lld", i + 1,
                     static_cast<long long>(own.images), static_cast<long long>(sizes->images));
    for (int k = 0; k < SPIKENM_RANK && i; ++k)
      if (own.batch[k] != sizes->batch[k])
        return (*fail)("input %d has another batch than those before it", i + 1);
    if (timed && has_time && own.steps != sizes->steps)
      return (*fail)("input %d has %lld time steps, and those before it %lld", i + 1,
                     static_cast<long long>(own.steps), static_cast<long long>(sizes->steps));
    const int64_t steps = sizes->steps;
    if (!i) *sizes = own;
    if (i && !has_time) sizes->steps = steps;
    if (has_time) sizes->steps = own.steps;
    timed |= has_time;
  }
  if (step && model.makes_steps)
    return (*fail)("the network makes all its time steps of one input: it has no single ones");
  if (model.fixed_steps) sizes->steps = step ? 1 : model.fixed_steps;
  const int64_t only[2] = {step ? 0 : model.only_steps, model.only_images};
  const int64_t got[2] = {sizes->steps, sizes->images};
  for (int i = 0; i < 2; ++i)
    if (only[i] && got[i] != only[i])
      return (*fail)("the input has %lld %s; the model computes otherwise, or not at all, where "
                     "there are not %lld: make an engine from examples of this size",
                     static_cast<long long>(got[i]), i ? "samples" : "time steps",
                     static_cast<long long>(only[i]));
  if (sizes->steps < 1) return (*fail)("the input has no time steps; at least one is required");
  return true;
}

int32_t net_shape(const NetPort &port, const NetSizes &sizes, bool step, int64_t *shape) {
  int32_t rank = 0;
  for (int64_t i = 0; i < port.rank; ++i) {
    const NetAxis &a = port.axes[i];
    if (a.role == kTime && step && !a.joined) continue;
    const int64_t size = a.role == kTime ? (step ? 1 : sizes.steps)
                         : a.role == kBatch ? sizes.batch[a.size]
                                            : a.size;
    if (a.joined && rank)
      shape[rank - 1] *= size;
    else
      shape[rank++] = size;
  }
  return rank;
}

void net_load(const NetModel &model, const NetPort &port, const NetSizes &sizes, bool step,
              int64_t image, const float *x, float *to) {
  const NetValue &v = model.values[static_cast<size_t>(port.value)];
  const Walk walk(port, v, sizes, step, true, image);
  const int64_t near = walk.near(), far = walk.far();
  walk.run([&](int64_t element, int64_t place, int64_t count) {
    if (near == 1 && far == 1) {
      memcpy(to + place, x + element, sizeof(float) * static_cast<size_t>(count));
      return;
    }
    for (int64_t k = 0; k < count; ++k) to[place + k * far] = x[element + k * near];
  });
}

void net_store(const NetModel &model, const NetPort &port, const NetSizes &sizes, bool step,
               int64_t image, const void *from, float *y) {
  NetValue v = model.values[static_cast<size_t>(port.value)];
  const bool bits = v.bits != 0;
  if (bits) v.stride *= 64;
  const Walk walk(port, v, sizes, step, false, image);
  const int64_t near = walk.near(), far = walk.far();
  walk.run([&](int64_t element, int64_t place, int64_t count) {
    if (!bits && near == 1 && far == 1) {
      memcpy(y + element, static_cast<const float *>(from) + place,
             sizeof(float) * static_cast<size_t>(count));
      return;
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = place + k * far;
      y[element + k * near] =
          bits ? static_cast<float>(static_cast<const uint64_t *>(from)[at / 64] >> (at % 64) & 1)
               : static_cast<const float *>(from)[at];
    }
  });
}
