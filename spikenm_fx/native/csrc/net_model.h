// SPDX-License-Identifier: Apache-2.0
// A network as it was read and checked, with the layouts that its operations run on.
#pragma once
#include <list>

#include "net_file.h"
#include "net_weights.h"

// Memory of one purpose, aligned for every vector; null where there was none to be had.
class NetMemory {
 public:
  NetMemory() = default;
  NetMemory(const NetMemory &) = delete;
  NetMemory &operator=(const NetMemory &) = delete;
  NetMemory(NetMemory &&other) noexcept : at_(other.at_), size_(other.size_) {
    other.at_ = nullptr;
  }
  ~NetMemory();
  bool take(int64_t bytes);  // zeros
  float *floats() const { return static_cast<float *>(at_); }
  char *bytes() const { return static_cast<char *>(at_); }
  int64_t size() const { return size_; }

 private:
  void *at_ = nullptr;
  int64_t size_ = 0;
};

// What one neuron layer, or what a step stores for the next one, keeps between calls.
struct NetState {
  int64_t value = kNoValue;  // of the size of its membranes, or what is stored
  int64_t op = 0;
  int64_t store = kNoValue;  // the operation that stores it; of a neuron's itself
  bool forgets = false;
  std::vector<float> initial;  // one, or one per number
};

// Packed rows that are all there is of two of the file's tensors.
struct NetPacked {
  NetTensor values;
  StoredWeight weight;
  NetLayerMemory at;
  int64_t op;
};

struct NetModel {
  std::vector<int64_t> code;
  std::vector<NetValue> values;
  std::vector<NetOp> ops;
  std::vector<NetMemory> memory;
  std::vector<int64_t> last_use;  // of each value: the operation after which nobody reads it
  std::vector<NetPort> inputs;
  std::vector<NetPort> outputs;
  std::vector<NetState> states;
  std::vector<NetLoop> loops;
  int64_t fixed_steps = 0;  // 0: the input's time axis says how many, or there is one step
  int64_t only_steps = 0, only_images = 0;  // 0: any; else the model itself takes no other
  bool small = false;                        // weights stay packed in memory
  bool makes_steps = false;                  // one token of its input becomes all of them
  int64_t weight_bytes = 0;                  // of all layouts that operations run on
  std::list<NetPacked> packed;

  bool build(const NetImage &image, NetFailure *fail);
  // Values or indices as they were in the file, where weights stay packed: fills `to` if it is not
  // null, and returns how many bytes they are; -1 for any other tensor.
  int64_t stored(int64_t tensor, uint8_t *to) const;

 private:
  bool check_ports(NetFailure *fail) const;
  bool read_values(const int64_t *w, int64_t n, NetFailure *fail);
  bool read_port(const int64_t *w, NetPort *port, NetFailure *fail);
  bool read_op(const NetImage &image, int64_t index, std::vector<bool> *written, NetFailure *fail);
  bool check_layer(const NetImage &image, NetOp *op, NetFailure *fail);
  bool check_neuron(const NetImage &image, int64_t index, NetOp *op, NetFailure *fail);
  bool check_pool(const NetOp &op, NetFailure *fail) const;
  bool check_affine(const NetImage &image, NetOp *op, NetFailure *fail);
  bool check_others(const NetOp &op, NetFailure *fail) const;
  bool check_strided(const NetOp &op) const;
  bool check_recall(const NetImage &image, int64_t index, NetOp *op, NetFailure *fail);
  bool check_store(int64_t index, NetOp *op);
  bool check_compare(const NetImage &image, NetOp *op, NetFailure *fail);
  bool check_softmax(const NetOp &op) const;
  bool check_steps(const NetOp &op);
  bool find_loops(NetFailure *fail);
  bool joins_neuron(size_t layer) const;
  NetState *state_of(int64_t which);
  bool check_norm(const NetImage &image, NetOp *op, NetFailure *fail);
  const NetTensor *tensor(const NetImage &image, int64_t id) const;
  // Rows of parameters, one number or one per channel, spread over the numbers of a value.
  bool spread(const NetTensor *t, int64_t rows, const NetValue &v, NetOp *op, NetFailure *fail);
};
