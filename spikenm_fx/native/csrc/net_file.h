// SPDX-License-Identifier: Apache-2.0
// The file of a network: safetensors, whose header is JSON of a known form, and what it must say.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "net.h"

// A sentence for the caller; the first one stays.
struct NetFailure {
  char text[SPIKENM_MESSAGE] = "";
  bool operator()(const char *format, ...) __attribute__((format(printf, 2, 3)));  // false
};

struct NetImage {
  std::map<std::string, std::string> metadata;
  std::map<std::string, NetTensor> tensors;
  std::vector<const NetTensor *> order;  // as operations number them

  // Reads and checks a whole file; the tensors point into it.
  bool read(const uint8_t *bytes, size_t size, NetFailure *fail);

 private:
  bool names(NetFailure *fail);
};
