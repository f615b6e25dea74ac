// SPDX-License-Identifier: Apache-2.0
// Everything that a program says is checked here, once: what runs it relies on that.
#include "net_model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr size_t kLargePage = 2 << 20;
constexpr int64_t kMostValues = 1 << 24;  // numbers of a token: 64 MiB
constexpr int64_t kLeastGathered = 32, kLeastPixels = 5;
constexpr int64_t kHeadWords = 8, kValueWords = 5, kPortWords = 2 + 3 * SPIKENM_RANK;

bool within(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace

NetMemory::~NetMemory() { free(at_); }

bool NetMemory::take(int64_t bytes) {
  free(at_);
  const size_t size = static_cast<size_t>(round_up(bytes > 64 ? bytes : 64, 64));
  const bool large = size >= 2 * kLargePage;
  // Not aligned_alloc, which takes whole multiples of the alignment alone.
  if (posix_memalign(&at_, large ? kLargePage : 64, size)) at_ = nullptr;
  size_ = at_ ? static_cast<int64_t>(size) : 0;
#if defined(__linux__)
  // Rows of weights are read here and there: small pages would be looked up all the time.
  if (at_ && large) madvise(at_, size, MADV_HUGEPAGE);
#endif
  if (at_) memset(at_, 0, size);
  return at_ != nullptr;
}

bool NetModel::build(const NetImage &image, NetFailure *fail) {
  const auto memory_kind = image.metadata.find("memory");
  if (memory_kind != image.metadata.end()) {
    small = memory_kind->second == "small";
    if (!small && memory_kind->second != "fast")
      return (*fail)("it asks for memory %.20s; this release knows fast and small",
                     memory_kind->second.c_str());
  }
  const NetTensor *program = image.order[0];
  const int64_t n = program->bytes / 8;
  if (program->dtype != 5 || n < kHeadWords) return (*fail)("its program is no list of integers");
  code.resize(static_cast<size_t>(n));
  memcpy(code.data(), program->data, static_cast<size_t>(n) * 8);
  const int64_t *w = code.data();
  if (!within(w[0], 1, kNetVersion))
    return (*fail)("its program starts with %lld instead of its version, 1 or 2",
                   static_cast<long long>(w[0]));
  const int64_t n_values = w[1], n_ops = w[2], n_outputs = w[3];
  const int64_t n_inputs = w[0] > 1 ? w[7] : 1;
  fixed_steps = w[4], only_steps = w[5], only_images = w[6];
  if (!within(n_values, 1, n) || !within(n_ops, 0, n) || !within(n_outputs, 1, n) ||
      !within(n_inputs, 1, SPIKENM_INPUTS) || !within(fixed_steps, 0, 1 << 20) || !within(only_steps, 0, 1ll << 40) ||
      !within(only_images, 0, 1ll << 40) ||
      n != kHeadWords + n_values * kValueWords + (n_inputs + n_outputs) * kPortWords + n_ops * kOpWords)
    return (*fail)("its program has another length than its head says");
  w += kHeadWords;
  if (!read_values(w, n_values, fail)) return false;
  w += n_values * kValueWords;
  inputs.resize(static_cast<size_t>(n_inputs));
  outputs.resize(static_cast<size_t>(n_outputs));
  std::vector<bool> written(values.size());
  for (NetPort &input : inputs) {
    if (!read_port(w, &input, fail)) return false;
    w += kPortWords;
    if (values[static_cast<size_t>(input.value)].bits) return (*fail)("its input is made of bits");
    if (written[static_cast<size_t>(input.value)]) return (*fail)("two inputs are one value");
    written[static_cast<size_t>(input.value)] = true;
  }
  for (NetPort &output : outputs) {
    if (!read_port(w, &output, fail)) return false;
    w += kPortWords;
  }
  ops.resize(static_cast<size_t>(n_ops));
  last_use.assign(values.size(), -1);
  for (int64_t i = 0; i < n_ops; ++i) {
    ops[static_cast<size_t>(i)].word = w + i * kOpWords;
    if (!read_op(image, i, &written, fail)) return false;
  }
  if (!check_ports(fail)) return false;
  for (const NetPort &output : outputs) {
    if (!written[static_cast<size_t>(output.value)]) return (*fail)("an output is never computed");
    last_use[static_cast<size_t>(output.value)] = n_ops;
  }
  for (const NetState &state : states)
    if (state.value == kNoValue) return (*fail)("a state belongs to no neuron");
  for (size_t i = 0; i + 1 < ops.size(); ++i) {
    ops[i].with_neuron = joins_neuron(i);
    if (!ops[i].with_neuron) continue;
    // The neuron's spikes are written while other steps of the layer's input are still to be read.
    int64_t &last = last_use[static_cast<size_t>(ops[i].word[kIn0])];
    last = std::max(last, static_cast<int64_t>(i) + 1);
  }
  for (const NetMemory &each : memory) weight_bytes += each.size();
  return find_loops(fail);
}

// Whether a layer's sums need not be written, as the neuron behind it alone reads them.
bool NetModel::joins_neuron(size_t layer) const {
  const NetOp &op = ops[layer];
  const int64_t *w = op.word, *next = ops[layer + 1].word;
  return w[kCode] == kLayer && op.form == kTapRows && next[kCode] == kNeuron &&
         next[kIn0] == w[kOut0] && next[kOut1] == kNoValue && next[kNeuronEmits] == kSpikes &&
         last_use[static_cast<size_t>(w[kOut0])] == static_cast<int64_t>(layer) + 1 &&
         !ops[layer + 1].floor && op.group_outputs % kOutputBlock == 0;
}

// All inputs and outputs have the same batch.
bool NetModel::check_ports(NetFailure *fail) const {
  int64_t free_axes = 0;
  for (size_t k = 0; k < inputs.size(); ++k) {
    int64_t own = 0;
    if (fixed_steps && values[static_cast<size_t>(inputs[k].value)].timed)
      return (*fail)("its input has time steps, of which its program fixes the number");
    for (int64_t i = 0; i < inputs[k].rank; ++i) {
      if (inputs[k].axes[i].joined) return (*fail)("axes of its input are joined");
      own += inputs[k].axes[i].role == kBatch;
    }
    if (k && own != free_axes) return (*fail)("its inputs differ in the axes of the batch");
    free_axes = own;
  }
  for (const NetPort &output : outputs) {
    int64_t seen = 0;
    for (int64_t i = 0; i < output.rank; ++i)
      if (output.axes[i].role == kBatch && output.axes[i].size < free_axes)
        seen |= 1ll << output.axes[i].size;
      else if (output.axes[i].role == kBatch)
        return (*fail)("an output has a batch axis that its input lacks");
    if (seen != (1ll << free_axes) - 1) return (*fail)("an output lacks an axis of the batch");
  }
  return true;
}

bool NetModel::read_values(const int64_t *w, int64_t n, NetFailure *fail) {
  for (int64_t i = 0; i < n; ++i, w += kValueWords) {
    NetValue v = {w[0], w[1], w[2], w[3], w[4], 0, 0};
    if (!within(v.bits, 0, 1) || !within(v.timed, 0, 1) || !within(v.h, 1, kMostValues) ||
        !within(v.w, 1, kMostValues) || !within(v.c, 1, kMostValues) ||
        v.h * v.w > kMostValues || v.h * v.w * v.c > kMostValues)
      return (*fail)("value %lld of its program has an impossible shape",
                     static_cast<long long>(i));
    v.size = v.h * v.w * v.c;
    // Vectors run over the end, and neurons take 64 numbers at a time.
    v.stride = v.bits ? (v.size + 63) / 64 : round_up(v.size, 64) + 64;
    values.push_back(v);
  }
  return true;
}

bool NetModel::read_port(const int64_t *w, NetPort *port, NetFailure *fail) {
  *port = {w[0], w[1], {}};
  if (!within(port->value, 0, static_cast<int64_t>(values.size()) - 1) ||
      !within(port->rank, 0, SPIKENM_RANK))
    return (*fail)("an input or output of its program is none of its values");
  const NetValue &v = values[static_cast<size_t>(port->value)];
  int64_t sizes[kRoles] = {1, 1, 1, 1, 1}, times = 0;
  for (int64_t i = 0; i < port->rank; ++i) {
    const NetAxis a = {w[2 + 3 * i], w[3 + 3 * i], w[4 + 3 * i]};
    if (!within(a.role, 0, kRoles - 1) || !within(a.size, 0, kMostValues) ||
        !within(a.joined, 0, i ? 1 : 0))
      return (*fail)("an axis of an input or output is impossible");
    times += a.role == kTime;
    if (a.role >= kChannel && a.size < 1) return (*fail)("an axis of channels or pixels is empty");
    if (a.role >= kChannel &&
        (__builtin_mul_overflow(sizes[a.role], a.size, &sizes[a.role]) ||
         sizes[a.role] > kMostValues))
      return (*fail)("an axis of an input or output is too long");
    port->axes[i] = a;
  }
  if (sizes[kChannel] != v.c || sizes[kHeight] != v.h || sizes[kWidth] != v.w ||
      times != v.timed)
    return (*fail)("the axes of an input or output do not make up its value");
  return true;
}

const NetTensor *NetModel::tensor(const NetImage &image, int64_t id) const {
  return within(id, 1, static_cast<int64_t>(image.order.size()) - 1)
             ? image.order[static_cast<size_t>(id)]
             : nullptr;
}

bool NetModel::read_op(const NetImage &image, int64_t index, std::vector<bool> *written,
                       NetFailure *fail) {
  NetOp *op = &ops[static_cast<size_t>(index)];
  const int64_t *w = op->word;
  const int64_t last = static_cast<int64_t>(values.size()) - 1;
  if (!within(w[kCode], 1, kOpCodes - 1))
    return (*fail)("operation %lld is of an unknown kind", static_cast<long long>(index));
  const bool two = w[kCode] == kJoin || w[kCode] == kConcat ||
                   (w[kCode] == kStrided && w[kMode] != kCopy);
  if (w[kCode] >= kRecall && code[0] < 2)
    return (*fail)("operation %lld is of a later version", static_cast<long long>(index));
  for (int k = kIn0; k <= kIn1; ++k) {
    if ((k == kIn1 && !two) || w[kCode] == kRecall) continue;
    if (!within(w[k], 0, last) || !(*written)[static_cast<size_t>(w[k])])
      return (*fail)("operation %lld reads what was never computed", static_cast<long long>(index));
    last_use[static_cast<size_t>(w[k])] = index;
  }
  for (int k = kOut0; k <= kOut1; ++k) {
    if ((k == kOut1 && (w[kCode] != kNeuron || w[k] == kNoValue)) || w[kCode] == kStore) continue;
    if (!within(w[k], 0, last) || (*written)[static_cast<size_t>(w[k])])
      return (*fail)("operation %lld writes over another value", static_cast<long long>(index));
    (*written)[static_cast<size_t>(w[k])] = true;
    last_use[static_cast<size_t>(w[k])] = index;
  }
  memory.emplace_back();
  bool well = false;
  if (w[kCode] == kLayer) well = check_layer(image, op, fail);
  else if (w[kCode] == kNeuron) well = check_neuron(image, index, op, fail);
  else if (w[kCode] == kPool) well = check_pool(*op, fail);
  else if (w[kCode] == kAffine) well = check_affine(image, op, fail);
  else if (w[kCode] == kStrided) well = check_strided(*op);
  else if (w[kCode] == kNorm) well = check_norm(image, op, fail);
  else if (w[kCode] == kRecall) well = check_recall(image, index, op, fail);
  else if (w[kCode] == kStore) well = check_store(index, op);
  else if (w[kCode] == kCompare) well = check_compare(image, op, fail);
  else if (w[kCode] == kSoftmax) well = check_softmax(*op);
  else if (w[kCode] == kSteps) well = check_steps(*op);
  else well = check_others(*op, fail);
  if (!well)
    return (*fail)("operation %lld does not fit its values", static_cast<long long>(index));
  op->memory = memory.back().floats();
  return true;
}

bool NetModel::check_layer(const NetImage &image, NetOp *op, NetFailure *fail) {
  const int64_t *w = op->word;
  const NetValue &in = values[static_cast<size_t>(w[kIn0])];
  const NetValue &out = values[static_cast<size_t>(w[kOut0])];
  const bool flat = w[kLayerFlat] != 0;
  for (int i = 0; i < 2; ++i)
    if (!within(w[kLayerKernel + i], 1, 1 << 12) || !within(w[kLayerStride + i], 1, 1 << 12) ||
        !within(w[kLayerPadding + i], 0, 1 << 12) || !within(w[kLayerDilation + i], 1, 1 << 12))
      return false;
  if (!within(w[kLayerGroups], 1, out.c) || !within(w[kLayerFlat], 0, 2) || out.bits ||
      in.timed != out.timed || w[kLayerOutputs] != out.c || out.c % w[kLayerGroups])
    return false;
  if (flat && (w[kLayerGroups] != 1 || w[kLayerKernel] * w[kLayerKernel + 1] != 1 ||
               w[kLayerInputs] != in.size || out.h * out.w != 1))
    return false;
  if (!flat && (in.c % w[kLayerGroups] || w[kLayerInputs] != in.c / w[kLayerGroups])) return false;
  const int64_t sizes[2] = {in.h, in.w}, outs[2] = {out.h, out.w};
  for (int i = 0; i < 2 && !flat; ++i) {
    const int64_t reach = w[kLayerDilation + i] * (w[kLayerKernel + i] - 1) + 1;
    const int64_t room = sizes[i] + 2 * w[kLayerPadding + i] - reach;
    if (room < 0 || room / w[kLayerStride + i] + 1 != outs[i]) return false;
  }
  op->taps = w[kLayerKernel] * w[kLayerKernel + 1];
  op->inputs = w[kLayerInputs];
  op->group_outputs = out.c / w[kLayerGroups];
  op->group_stride = round_up(op->group_outputs, kLanesMost);
  const int64_t row = op->group_stride * w[kLayerGroups];
  if (out.h * out.w * row > 8 * kMostValues) return (*fail)("a layer of its program is too large");
  // Few outputs are sooner added where they belong, and so are taps that lie apart; weights of few
  // pixels are sooner read in whole rows than used twice.
  const bool gathers = !flat && w[kLayerGroups] == 1 && w[kLayerDilation + 1] == 1 &&
                       op->group_outputs >= kLeastGathered && out.h * out.w >= kLeastPixels;
  const StoredWeight stored = {tensor(image, w[kTensor0]), tensor(image, w[kTensor1]),
                         tensor(image, w[kTensor2]), tensor(image, w[kTensor3]),
                         w[kLayerKeep], w[kLayerOf], out.c, op->inputs, op->taps,
                         w[kLayerGroups], w[kLayerKernel + 1], gathers, in.h * in.w,
                         w[kLayerFlat] == 2 ? in.c : 0};
  if (!stored.fits()) return (*fail)("the weights of a layer are not what its program says");
  NetLayerMemory at = {};
  if (!stored.plan(small, op->group_stride, &at) || !memory.back().take(at.size))
    return (*fail)("there is no memory for the weights of a layer");
  char *to = memory.back().bytes();
  op->form = at.form;
  op->type = stored.values->dtype;
  op->codes = reinterpret_cast<const uint8_t *>(to) + at.codes;
  op->code_bytes = at.code_bytes;
  op->bias = reinterpret_cast<const float *>(to + at.bias);
  op->scale = at.scale ? reinterpret_cast<const float *>(to + at.scale) : nullptr;
  if (!stored.lay_out(to, at, op->group_stride))
    return (*fail)("the weights of a layer are not N:M, or not finite");
  if (!small) return true;
  packed.push_back({*stored.values, stored, at, op - ops.data()});
  NetPacked &kept = packed.back();
  kept.values.data = nullptr;  // the file is gone when this is read
  kept.weight = {&kept.values, nullptr, nullptr, nullptr, stored.keep, stored.of, stored.outputs,
                 stored.inputs, stored.taps, stored.groups, stored.kw, false, 0, 0};
  return true;
}

int64_t NetModel::stored(int64_t tensor, uint8_t *to) const {
  for (const NetPacked &kept : packed) {
    const int64_t *w = ops[static_cast<size_t>(kept.op)].word;
    const bool values = w[kTensor0] == tensor;
    if (!values && w[kTensor1] != tensor) continue;
    const char *from = memory[static_cast<size_t>(kept.op)].bytes();
    const int64_t bytes = values ? kept.values.bytes : kept.weight.index_bytes();
    if (to) memset(to, 0, static_cast<size_t>(bytes));
    if (to) kept.weight.read_back(from, kept.at, values ? to : nullptr, values ? nullptr : to);
    return bytes;
  }
  return -1;
}

bool NetModel::spread(const NetTensor *t, int64_t rows, const NetValue &v, NetOp *op,
                      NetFailure *fail) {
  if (!t || t->dtype != 0 || t->rank != 2 || t->shape[0] != rows) return false;
  const int64_t n = t->shape[1];
  if (n != 1 && n != v.c && n != v.size) return false;
  op->wide = n == 1 ? kLanesMost : round_up(v.size, 64) + 64;
  if (!memory.back().take(rows * op->wide * 4)) return (*fail)("there is no memory for it");
  float *to = memory.back().floats();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < op->wide; ++i)
      memcpy(to + r * op->wide + i, t->data + 4 * (r * n + (n == 1 ? 0 : i % n)), 4);
  return true;
}

bool NetModel::check_neuron(const NetImage &image, int64_t index, NetOp *op, NetFailure *fail) {
  const int64_t *w = op->word;
  const NetValue &in = values[static_cast<size_t>(w[kIn0])];
  const NetValue &out = values[static_cast<size_t>(w[kOut0])];
  const bool spikes = w[kNeuronEmits] == kSpikes;
  if (!within(w[kNeuronReset], 0, 2) || !within(w[kNeuronTiming], 0, 2) ||
      !within(w[kNeuronInclusive], 0, 1) || !within(w[kNeuronSynapse], 0, 2) ||
      !within(w[kNeuronEmits], 0, 2) || !within(w[kNeuronForgets], 0, 1))
    return false;
  if ((w[kNeuronTiming] && (!spikes || (w[kNeuronTiming] == 2 && w[kNeuronReset] == 1))) ||
      in.bits || out.bits != spikes || in.size != out.size || in.c != out.c ||
      in.timed > out.timed)
    return false;
  if (w[kOut1] != kNoValue) {
    const NetValue &shown = values[static_cast<size_t>(w[kOut1])];
    if (shown.bits || shown.size != out.size || shown.timed != out.timed) return false;
  }
  const NetTensor *rule = tensor(image, w[kTensor0]);
  const int64_t rows = rule && rule->rank == 2 && rule->shape[0] == 9 ? 9 : 8;
  if (!spread(rule, rows, out, op, fail)) return false;
  op->floor = rows == 9 ? memory.back().floats() + 8 * op->wide : nullptr;
  op->state_stride = round_up(out.size, 64) + 64;
  NetState *state = state_of(w[kNeuronState]);
  if (!state || state->value != kNoValue) return false;
  const float *initial = memory.back().floats() + 7 * op->wide;
  state->value = w[kOut0], state->op = state->store = index;
  state->forgets = w[kNeuronForgets] != 0;
  state->initial.assign(initial, initial + op->wide);
  return true;
}

NetState *NetModel::state_of(int64_t which) {
  if (!within(which, 0, static_cast<int64_t>(ops.size()) - 1)) return nullptr;
  const size_t at = static_cast<size_t>(which);
  if (states.size() <= at) states.resize(at + 1);
  return &states[at];
}

bool NetModel::check_recall(const NetImage &image, int64_t index, NetOp *op, NetFailure *fail) {
  const int64_t *w = op->word;
  const NetValue &out = values[static_cast<size_t>(w[kOut0])];
  NetState *state = state_of(w[kRecallState]);
  if (!state || state->value != kNoValue || !within(w[kRecallForgets], 0, 1)) return false;
  op->state_stride = round_up(out.size, 64) + 64;
  state->value = w[kOut0], state->op = index, state->forgets = w[kRecallForgets] != 0;
  state->initial.assign(kLanesMost, 0.0f);
  if (w[kTensor0] < 0) return true;
  if (out.bits || !spread(tensor(image, w[kTensor0]), 1, out, op, fail)) return false;
  state->initial.assign(memory.back().floats(), memory.back().floats() + op->wide);
  return true;
}

bool NetModel::check_store(int64_t index, NetOp *op) {
  const NetValue &in = values[static_cast<size_t>(op->word[kIn0])];
  NetState *state = state_of(op->word[kStoreState]);
  if (!state || state->value == kNoValue || state->store != kNoValue) return false;
  const NetValue &out = values[static_cast<size_t>(state->value)];
  state->store = index;
  op->state_stride = ops[static_cast<size_t>(state->op)].state_stride;
  return in.size == out.size && in.bits == out.bits && in.timed == out.timed;
}

bool NetModel::check_compare(const NetImage &image, NetOp *op, NetFailure *fail) {
  const NetValue &in = values[static_cast<size_t>(op->word[kIn0])];
  const NetValue &out = values[static_cast<size_t>(op->word[kOut0])];
  if (!out.bits || in.bits || in.size != out.size || in.c != out.c || in.timed != out.timed ||
      !within(op->word[kMode], 0, kCompares - 1))
    return false;
  return spread(tensor(image, op->word[kTensor0]), 1, out, op, fail);
}

// Whole runs of `size` numbers, `apart` from each other, make up a token.
bool NetModel::check_softmax(const NetOp &op) const {
  const int64_t *w = op.word;
  const NetValue &in = values[static_cast<size_t>(w[kIn0])];
  const NetValue &out = values[static_cast<size_t>(w[kOut0])];
  return !out.bits && in.size == out.size && in.timed == out.timed &&
         within(w[kSoftmaxMode], 0, 1) && within(w[kSoftmaxSize], 1, in.size) &&
         within(w[kSoftmaxApart], 1, in.size) &&
         in.size % (w[kSoftmaxSize] * w[kSoftmaxApart]) == 0;
}

bool NetModel::check_steps(const NetOp &op) {
  const NetValue &in = values[static_cast<size_t>(op.word[kIn0])];
  const NetValue &out = values[static_cast<size_t>(op.word[kOut0])];
  makes_steps = true;
  return !in.timed && out.timed && !out.bits && fixed_steps > 0 &&
         in.size == fixed_steps * out.size;
}

// What lies between the reading of a state and its storing runs step by step.
bool NetModel::find_loops(NetFailure *fail) {
  for (const NetState &state : states) {
    if (state.store == kNoValue) return (*fail)("a state is never stored");
    if (state.store == state.op) continue;  // a neuron's own
    NetLoop loop = {state.op, state.store + 1, values[static_cast<size_t>(state.value)].timed};
    for (size_t k = loops.size(); k-- > 0;) {  // one with all that it overlaps
      if (loops[k].to <= loop.from || loop.to <= loops[k].from) continue;
      loop.from = std::min(loop.from, loops[k].from), loop.to = std::max(loop.to, loops[k].to);
      if (loop.timed != loops[k].timed) return (*fail)("a loop of its program is impossible");
      loops.erase(loops.begin() + static_cast<int64_t>(k));
    }
    loops.push_back(loop);
  }
  std::sort(loops.begin(), loops.end(),
            [](const NetLoop &a, const NetLoop &b) { return a.from < b.from; });
  for (const NetLoop &loop : loops)
    for (int64_t i = loop.from; i < loop.to; ++i) {
      const int64_t *w = ops[static_cast<size_t>(i)].word;
      if (w[kCode] == kReduce || w[kCode] == kSteps ||
          (w[kCode] != kStore && values[static_cast<size_t>(w[kOut0])].timed != loop.timed))
        return (*fail)("operation %lld cannot run step by step", static_cast<long long>(i));
      // The next step reads it again.
      for (int k = kIn0; k <= kOut1; ++k)
        if (within(w[k], 0, static_cast<int64_t>(values.size()) - 1))
          last_use[static_cast<size_t>(w[k])] =
              std::max(last_use[static_cast<size_t>(w[k])], loop.to - 1);
    }
  return true;
}

bool NetModel::check_pool(const NetOp &op, NetFailure *) const {
  const int64_t *w = op.word;
  const NetValue &in = values[static_cast<size_t>(w[kIn0])];
  const NetValue &out = values[static_cast<size_t>(w[kOut0])];
  if (!within(w[kPoolMode], 0, 3) || in.c != out.c || in.timed != out.timed ||
      !within(w[kPoolCountsPadding], 0, 1) || !within(w[kPoolDivisor], 0, kMostValues) ||
      out.bits != (in.bits && w[kPoolMode] == kMax))
    return false;
  if (w[kPoolMode] >= kAdaptiveMax) return out.h <= 4096 && out.w <= 4096;
  const int64_t sizes[2] = {in.h, in.w}, outs[2] = {out.h, out.w};
  for (int i = 0; i < 2; ++i) {
    const int64_t k = w[kPoolKernel + i], s = w[kPoolStride + i], p = w[kPoolPadding + i];
    if (!within(k, 1, 1 << 12) || !within(s, 1, 1 << 12) || !within(p, 0, k / 2) ||
        !within(w[kPoolDilation + i], 1, w[kPoolMode] == kMax ? 1 << 12 : 1))
      return false;
    // Every window starts inside, and holds at least one number.
    const int64_t start = (outs[i] - 1) * s - p, reach = (k - 1) * w[kPoolDilation + i];
    if (start >= sizes[i] || -p + reach < 0 || (start < 0 && start + reach < 0)) return false;
  }
  return true;
}

bool NetModel::check_affine(const NetImage &image, NetOp *op, NetFailure *fail) {
  const NetValue &in = values[static_cast<size_t>(op->word[kIn0])];
  const NetValue &out = values[static_cast<size_t>(op->word[kOut0])];
  if (out.bits || in.size != out.size || in.c != out.c || in.timed != out.timed) return false;
  return spread(tensor(image, op->word[kTensor0]), 2, out, op, fail);
}

bool NetModel::check_norm(const NetImage &image, NetOp *op, NetFailure *fail) {
  const NetValue &in = values[static_cast<size_t>(op->word[kIn0])];
  const NetValue &out = values[static_cast<size_t>(op->word[kOut0])];
  if (out.bits || in.size != out.size || in.c != out.c || in.timed != out.timed) return false;
  return spread(tensor(image, op->word[kTensor0]), 3, out, op, fail);
}

// No loop leads out of any token.
bool NetModel::check_strided(const NetOp &op) const {
  const int64_t *w = op.word;
  const bool one = w[kMode] == kCopy;
  const NetValue *of[3] = {&values[static_cast<size_t>(w[kOut0])],
                           &values[static_cast<size_t>(w[kIn0])],
                           &values[static_cast<size_t>(w[one ? kIn0 : kIn1])]};
  if (!within(w[kMode], 0, kCopy) || !within(w[kStridedCount], 1, kStridedLoops) || of[0]->bits ||
      !within(w[kStridedOffset], 0, of[1]->size - 1) || of[0]->timed != (of[1]->timed | of[2]->timed))
    return false;
  int64_t last[3] = {0, w[kStridedOffset], 0}, turns = 1;
  for (int64_t i = 0; i < w[kStridedCount]; ++i) {
    const int64_t *loop = w + kStridedLoop + 4 * i;
    if (!within(loop[0], 1, kMostValues) || __builtin_mul_overflow(turns, loop[0], &turns) ||
        turns > (1ll << 40))
      return false;
    for (int k = 0; k < 3; ++k) {
      if (!within(loop[1 + k], 0, kMostValues)) return false;
      last[k] += (loop[0] - 1) * loop[1 + k];
    }
  }
  return last[0] < of[0]->size && last[1] < of[1]->size && (one || last[2] < of[2]->size);
}

bool NetModel::check_others(const NetOp &op, NetFailure *) const {
  const int64_t *w = op.word;
  const NetValue &a = values[static_cast<size_t>(w[kIn0])];
  const NetValue &out = values[static_cast<size_t>(w[kOut0])];
  if (w[kCode] == kPointwise && !within(w[kMode], 0, kFunctions - 1)) return false;
  if (w[kCode] == kRelu || w[kCode] == kPointwise)
    return !out.bits && a.size == out.size && a.timed == out.timed;
  if (w[kCode] == kReduce)
    return within(w[kMode], 0, 2) && !out.bits && a.timed && !out.timed && a.size == out.size;
  const NetValue &b = values[static_cast<size_t>(w[kIn1])];
  if (out.timed != (a.timed | b.timed)) return false;
  if (w[kCode] == kJoin)
    return within(w[kMode], 0, 3) && !out.bits && a.size == out.size && b.size == out.size;
  return a.h == out.h && a.w == out.w && b.h == out.h && b.w == out.w && a.c + b.c == out.c &&
         out.bits == (a.bits & b.bits);
}
