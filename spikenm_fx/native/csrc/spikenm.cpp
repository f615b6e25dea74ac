// SPDX-License-Identifier: Apache-2.0
// The functions of spikenm.h, and the same for Python, which brings its own memory for outputs.
#include "spikenm.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <list>
#include <mutex>

#include "net_plan.h"

struct snm_prepared {
  spikenm_net *net;
  NetSizes sizes;
  bool step;
};

struct spikenm_net {
  NetModel model;
  std::mutex turn;
  std::list<NetPlan> plans;  // the latest first
  std::vector<NetMemory> states;
  std::vector<float *> state_memory;
  int64_t state_images = -1;
  bool at_rest = true;
  int64_t threads = 1;
  const snm_kernels *level = nullptr;
  NetSizes sizes;  // of the last call
  bool step = false, ran = false;
  std::list<snm_prepared> prepared;
  std::vector<NetMemory> results;  // of spikenm_output
  std::vector<int64_t> result_floats;
  void (*observe)(void *, int64_t, const void *, void *) = nullptr;
  void *context = nullptr;
};

namespace {

constexpr size_t kPlans = 4;
constexpr int64_t kCached = 1 << 18;  // bytes that a core keeps near it beside what runs

int32_t told(const NetFailure &fail, char *message) {
  if (message) memcpy(message, fail.text, sizeof fail.text);
  return -1;
}

const snm_kernels *best_level() {
  for (int32_t level = 3; level > 0; --level)
    if (const snm_kernels *found = snm_level(level)) return found;
  return snm_level(0);
}

NetPlan *plan_for(spikenm_net *net, int64_t steps, int64_t images, int64_t copies,
                  NetFailure *fail) {
  for (auto at = net->plans.begin(); at != net->plans.end(); ++at)
    if (at->steps == steps && at->images == images && at->copies == copies) {
      if (at != net->plans.begin()) net->plans.splice(net->plans.begin(), net->plans, at);
      return &net->plans.front();
    }
  net->plans.emplace_front();
  net->plans.front().steps = steps, net->plans.front().images = images;
  net->plans.front().copies = copies;
  if (!net->plans.front().lay_out(net->model, fail)) {
    net->plans.pop_front();
    return nullptr;
  }
  if (net->plans.size() > kPlans) net->plans.pop_back();
  return &net->plans.front();
}

void to_rest(spikenm_net *net, size_t which) {
  const NetState &state = net->model.states[which];
  const NetOp &op = net->model.ops[static_cast<size_t>(state.op)];
  float *v = net->state_memory[which];
  const int64_t one = op.state_stride, all = one * net->state_images;
  const int64_t known = static_cast<int64_t>(state.initial.size());
  for (int64_t i = 0; i < all; ++i) {
    const int64_t at = known == kLanesMost ? 0 : i % one;
    v[i] = state.initial[static_cast<size_t>(at < known ? at : known - 1)];
  }
  memset(v + all, 0, sizeof(float) * static_cast<size_t>(all));
}

// States for so many images; those that a whole forward starts with are at rest then.
bool ready_states(spikenm_net *net, int64_t images, bool step, NetFailure *fail) {
  const NetModel &model = net->model;
  if (net->state_images != images) {
    bool kept = false;
    for (const NetState &state : model.states) kept |= step || !state.forgets;
    if (kept && !net->at_rest)
      return (*fail)("its neurons hold the state of %lld streams and are given %lld; call reset() "
                     "between batches of different size",
                     static_cast<long long>(net->state_images), static_cast<long long>(images));
    net->state_images = -1;
    net->at_rest = true;
    net->states.resize(model.states.size());
    net->state_memory.resize(model.states.size());
    for (size_t i = 0; i < model.states.size(); ++i) {
      const NetOp &op = model.ops[static_cast<size_t>(model.states[i].op)];
      if (images > (1ll << 40) / op.state_stride ||
          !net->states[i].take(images * op.state_stride * 8))
        return (*fail)("there is no memory for the states of so many streams");
      net->state_memory[i] = net->states[i].floats();
    }
    net->state_images = images;
    for (size_t i = 0; i < model.states.size(); ++i) to_rest(net, i);
  }
  for (size_t i = 0; i < model.states.size() && !step; ++i)
    if (model.states[i].forgets) to_rest(net, i);
  return true;
}

// One call, cut into parts of which each runs its images in a row, in memory of its own.
struct Call {
  spikenm_net *net;
  NetPlan *plan;
  const NetSizes *sizes;
  bool step;
  int64_t threads;
  const float *const *x;  // by input
  float *const *outputs;

  static void part(void *self, int64_t index) { static_cast<const Call *>(self)->images_of(index); }

  void images_of(int64_t part) const {
    const int64_t images = sizes->images, parts = plan->copies;
    const size_t n = net->state_memory.size();
    float **states = plan->states.data() + static_cast<size_t>(part) * n;
    for (int64_t i = part * images / parts; i < (part + 1) * images / parts; ++i) {
      for (size_t s = 0; s < n; ++s) states[s] = net->state_memory[s] + i * stride_of(s);
      run(part, i, states);
    }
  }

  int64_t stride_of(size_t state) const {
    const NetModel &model = net->model;
    return model.ops[static_cast<size_t>(model.states[state].op)].state_stride;
  }

  // All images at once (-1), or one of them.
  void run(int64_t copy, int64_t image, float *const *states) const {
    const NetModel &model = net->model;
    const int64_t n_values = static_cast<int64_t>(model.values.size());
    void *const *memory = plan->memory.data() + copy * n_values;
    for (size_t i = 0; i < model.inputs.size(); ++i)
      net_load(model, model.inputs[i], *sizes, step, image, x[i],
               static_cast<float *>(memory[model.inputs[i].value]));
    const NetRun of = {model.ops.data(), static_cast<int64_t>(model.ops.size()),
                       model.values.data(), sizes->steps, image < 0 ? sizes->images : 1,
                       image < 0 ? threads : 1, model.loops.data(),
                       static_cast<int64_t>(model.loops.size()), n_values, memory,
                       plan->shifted.data() + copy * n_values, states, net->state_images,
                       net->observe, net->context};
    net->level->net_run(&of);
    for (size_t i = 0; i < model.outputs.size(); ++i)
      net_store(model, model.outputs[i], *sizes, step, image, memory[model.outputs[i].value],
                outputs[i]);
  }
};

bool run(spikenm_net *net, const float *const *x, const NetSizes &sizes, bool step,
         int64_t threads, float *const *outputs, NetFailure *fail) {
  const NetModel &model = net->model;
  if (!ready_states(net, sizes.images, step, fail)) return false;
  if (sizes.images == 0) return true;
  // Weights that stay in the caches are read again for each image; what lies between the layers is
  // not, and would not stay there for all images.  Who observes sees all images of an operation.
  const bool in_turn = sizes.images > 1 && model.weight_bytes <= kCached && !net->observe;
  const int64_t parts = in_turn ? std::max<int64_t>(1, std::min(threads, sizes.images)) : 1;
  NetPlan *plan = plan_for(net, sizes.steps, in_turn ? 1 : sizes.images, parts, fail);
  if (!plan) return false;
  net->at_rest = model.states.empty();
  Call call = {net, plan, &sizes, step, threads, x, outputs};
  if (in_turn)
    snm_parallel(parts, threads, Call::part, &call);
  else
    call.run(0, -1, net->state_memory.data());
  return true;
}

// One call whose outputs stay here.
int32_t call(spikenm_net *net, int32_t count, const float *const *x,
             const int64_t *const *shapes, const int32_t *ranks, bool step, char *message) {
  NetFailure fail;
  NetShape given[SPIKENM_INPUTS] = {};
  bool well = net && x && shapes && ranks && count > 0 && count <= SPIKENM_INPUTS;
  for (int32_t i = 0; well && i < count; ++i) {
    given[i] = {shapes[i], ranks[i]};
    well = x[i] && (!ranks[i] || shapes[i]);
  }
  if (!well) return fail("a pointer is null, or there are too many inputs"), told(fail, message);
  const std::lock_guard<std::mutex> turn(net->turn);
  NetSizes sizes;
  if (!net_sizes(net->model, given, count, step, &sizes, &fail)) return told(fail, message);
  const size_t n = net->model.outputs.size();
  net->results.resize(n);
  net->result_floats.resize(n, -1);
  std::vector<float *> outputs(n);
  for (size_t i = 0; i < n; ++i) {
    int64_t size[SPIKENM_RANK], floats = 1;
    const int32_t axes = net_shape(net->model.outputs[i], sizes, step, size);
    for (int32_t k = 0; k < axes; ++k) floats *= size[k];
    if (floats != net->result_floats[i] && !net->results[i].take(floats * 4))
      return fail("there is no memory for an output"), told(fail, message);
    net->result_floats[i] = floats;
    outputs[i] = net->results[i].floats();
  }
  net->ran = run(net, x, sizes, step, 1, outputs.data(), &fail);
  net->sizes = sizes, net->step = step;
  return net->ran ? 0 : told(fail, message);
}

}  // namespace

extern "C" {

spikenm_net *spikenm_open_bytes(const void *bytes, size_t size, char *message) {
  NetFailure fail;
  NetImage image;
  spikenm_net *net = new spikenm_net;
  if (!bytes) fail("a pointer is null");
  if (bytes && image.read(static_cast<const uint8_t *>(bytes), size, &fail) &&
      net->model.build(image, &fail)) {
    net->level = best_level();
    return net;
  }
  told(fail, message);
  delete net;
  return nullptr;
}

spikenm_net *spikenm_open(const char *path, char *message) {
  NetFailure fail;
  NetMemory content;
  FILE *file = path ? fopen(path, "rb") : nullptr;
  long size = -1;
  if (file && fseek(file, 0, SEEK_END) == 0) size = ftell(file);
  const bool well = size >= 0 && fseek(file, 0, SEEK_SET) == 0 && content.take(size) &&
                    fread(content.bytes(), 1, static_cast<size_t>(size), file) ==
                        static_cast<size_t>(size);
  if (!well) fail("%.300s cannot be read: %s", path ? path : "null", strerror(errno));
  if (file) fclose(file);
  if (!well) return told(fail, message), nullptr;
  return spikenm_open_bytes(content.bytes(), static_cast<size_t>(size), message);
}

void spikenm_close(spikenm_net *net) { delete net; }

void spikenm_reset(spikenm_net *net) {
  if (!net) return;
  const std::lock_guard<std::mutex> turn(net->turn);
  net->at_rest = true;
  if (net->state_images < 0) return;
  for (size_t i = 0; i < net->model.states.size(); ++i) to_rest(net, i);
}

int32_t spikenm_inputs(const spikenm_net *net) {
  return net ? static_cast<int32_t>(net->model.inputs.size()) : 0;
}

int32_t spikenm_input_at(const spikenm_net *net, int32_t index, int64_t *shape,
                         int32_t *time_axis, int32_t *is_free) {
  if (index < 0 || index >= spikenm_inputs(net)) return -1;
  const NetPort &in = net->model.inputs[static_cast<size_t>(index)];
  if (time_axis) *time_axis = -1;
  for (int64_t i = 0; i < in.rank; ++i) {
    if (shape) shape[i] = in.axes[i].size;
    if (is_free) is_free[i] = in.axes[i].role <= kBatch;
    if (time_axis && in.axes[i].role == kTime) *time_axis = static_cast<int32_t>(i);
  }
  return static_cast<int32_t>(in.rank);
}

int32_t spikenm_input(const spikenm_net *net, int64_t *shape, int32_t *time_axis,
                      int32_t *is_free) {
  return spikenm_input_at(net, 0, shape, time_axis, is_free);
}

int32_t spikenm_run(spikenm_net *net, const float *x, const int64_t *shape, int32_t rank,
                    char *message) {
  return call(net, 1, &x, &shape, &rank, false, message);
}

int32_t spikenm_step(spikenm_net *net, const float *x, const int64_t *shape, int32_t rank,
                     char *message) {
  return call(net, 1, &x, &shape, &rank, true, message);
}

int32_t spikenm_run_all(spikenm_net *net, int32_t count, const float *const *x,
                        const int64_t *const *shapes, const int32_t *ranks, char *message) {
  return call(net, count, x, shapes, ranks, false, message);
}

int32_t spikenm_step_all(spikenm_net *net, int32_t count, const float *const *x,
                         const int64_t *const *shapes, const int32_t *ranks, char *message) {
  return call(net, count, x, shapes, ranks, true, message);
}

int32_t spikenm_outputs(const spikenm_net *net) {
  return net ? static_cast<int32_t>(net->model.outputs.size()) : 0;
}

const float *spikenm_output(const spikenm_net *net, int32_t index, int64_t *shape,
                            int32_t *rank) {
  if (!net || !net->ran || index < 0 || index >= spikenm_outputs(net)) return nullptr;
  const NetPort &port = net->model.outputs[static_cast<size_t>(index)];
  int64_t size[SPIKENM_RANK];
  const int32_t axes = net_shape(port, net->sizes, net->step, size);
  if (rank) *rank = axes;
  for (int32_t i = 0; i < axes && shape; ++i) shape[i] = size[i];
  return net->results[static_cast<size_t>(index)].floats();
}

// ---- for spikenm_fx/program/native.py -----------------------------------------------------------

// Shapes of all outputs for inputs of these shapes: SPIKENM_RANK numbers and a rank each.
SNM_EXPORT int32_t snm_net_shapes(spikenm_net *net, const NetShape *given, int32_t count,
                                  int32_t step, int64_t *shapes, int32_t *ranks, char *message) {
  NetFailure fail;
  NetSizes sizes;
  if (!net_sizes(net->model, given, count, step != 0, &sizes, &fail)) return told(fail, message);
  for (size_t i = 0; i < net->model.outputs.size(); ++i)
    ranks[i] = net_shape(net->model.outputs[i], sizes, step != 0, shapes + i * SPIKENM_RANK);
  return 0;
}

// As spikenm_run_all and spikenm_step_all, into the caller's memory.
SNM_EXPORT int32_t snm_net_call(spikenm_net *net, const float *const *x, const NetShape *given,
                                int32_t count, int32_t step, int64_t threads,
                                float *const *outputs, char *message) {
  NetFailure fail;
  NetSizes sizes;
  const std::lock_guard<std::mutex> turn(net->turn);
  if (net_sizes(net->model, given, count, step != 0, &sizes, &fail) &&
      run(net, x, sizes, step != 0, threads, outputs, &fail))
    return 0;
  return told(fail, message);
}

// A call of one shape, for snm_net_go; null where that shape is refused, or memory is short.  It
// belongs to the network, and ends with it.
SNM_EXPORT snm_prepared *snm_net_prepare(spikenm_net *net, const NetShape *given, int32_t count,
                                         int32_t step, char *message) {
  NetFailure fail;
  NetSizes sizes;
  if (!net_sizes(net->model, given, count, step != 0, &sizes, &fail))
    return told(fail, message), nullptr;
  const std::lock_guard<std::mutex> turn(net->turn);
  net->prepared.push_back({net, sizes, step != 0});
  return &net->prepared.back();
}

// As snm_net_call of one input; `outputs`: the memory of the only output, or that of each.  What is wrong a call
// of snm_net_call tells.
SNM_EXPORT int32_t snm_net_go(snm_prepared *call, const float *x, void *outputs) {
  NetFailure fail;
  spikenm_net *net = call->net;
  float *only = static_cast<float *>(outputs);
  float *const *each = net->model.outputs.size() == 1 ? &only : static_cast<float **>(outputs);
  const std::lock_guard<std::mutex> turn(net->turn);
  return run(net, &x, call->sizes, call->step, net->threads, each, &fail) ? 0 : -1;
}

// How many threads calls of snm_net_go may use from now on.
SNM_EXPORT void snm_net_threads(spikenm_net *net, int64_t threads) {
  const std::lock_guard<std::mutex> turn(net->turn);
  net->threads = threads;
}

// Calls `observe` after each operation with its number, its first input and its output.
SNM_EXPORT void snm_net_observe(spikenm_net *net,
                                void (*observe)(void *, int64_t, const void *, void *),
                                void *context) {
  net->observe = observe, net->context = context;
}

// Runs on an ISA level from now on; -1 where this machine lacks it.
SNM_EXPORT int32_t snm_net_level(spikenm_net *net, int32_t level) {
  const snm_kernels *found = level < 0 ? best_level() : snm_level(level);
  if (!found) return -1;
  net->level = found;
  return 0;
}

// Of an engine that keeps its weights packed: the bytes of a tensor of its file, by its number,
// into `to` unless that is null.  Returns how many; -1 for a tensor that it does not keep so.
SNM_EXPORT int64_t snm_net_stored(const spikenm_net *net, int64_t tensor, void *to) {
  return net->model.stored(tensor, static_cast<uint8_t *>(to));
}

// Bytes of what an operation runs on; 0 for one that does not exist.
SNM_EXPORT int64_t snm_net_op_bytes(const spikenm_net *net, int64_t op) {
  const bool there = op >= 0 && op < static_cast<int64_t>(net->model.memory.size());
  return there ? net->model.memory[static_cast<size_t>(op)].size() : 0;
}

// Bytes: of all layouts that operations run on; of the plan of the last call.
SNM_EXPORT void snm_net_bytes(const spikenm_net *net, int64_t *layouts, int64_t *plan) {
  *layouts = *plan = 0;
  for (const NetMemory &memory : net->model.memory) *layouts += memory.size();
  for (const NetPlan &each : net->plans) *plan += each.arena.size();
}
}
