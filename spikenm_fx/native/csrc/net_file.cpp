// SPDX-License-Identifier: Apache-2.0
#include "net_file.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "sha256.h"

bool NetFailure::operator()(const char *format, ...) {
  if (text[0]) return false;
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return false;
}

namespace {

const char *const kTypes[] = {"F32", "F16", "BF16", "I8", "U8", "I64"};
const int64_t kBytes[] = {4, 2, 2, 1, 1, 8};

// JSON as safetensors writes it: an object of objects, of strings and arrays of whole numbers.
class Json {
 public:
  Json(const char *at, const char *end) : at_(at), end_(end) {}

  bool take(char c) {
    space();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }

  bool string(std::string *out) {
    out->clear();
    if (!take('"')) return false;
    while (at_ != end_ && *at_ != '"') {
      if (static_cast<unsigned char>(*at_) < 0x20) return false;
      if (*at_ != '\\')
        out->push_back(*at_++);
      else if (!escape(out))
        return false;
    }
    return take('"');
  }

  bool number(int64_t *out) {
    space();
    if (at_ == end_ || *at_ < '0' || *at_ > '9') return false;
    for (*out = 0; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_)
      if (__builtin_mul_overflow(*out, 10, out) || __builtin_add_overflow(*out, *at_ - '0', out))
        return false;
    return at_ == end_ || (*at_ != '.' && *at_ != 'e' && *at_ != 'E');
  }

  bool numbers(int64_t *out, int64_t most, int64_t *count) {
    *count = 0;
    if (!take('[')) return false;
    if (take(']')) return true;
    do {
      if (*count == most || !number(out + (*count)++)) return false;
    } while (take(','));
    return take(']');
  }

  // Calls `field(key)` for each field of an object, which reads its value.
  template <class Field>
  bool object(Field field) {
    if (!take('{')) return false;
    if (take('}')) return true;
    std::string key;
    do {
      if (!string(&key) || !take(':') || !field(key)) return false;
    } while (take(','));
    return take('}');
  }

  bool ended() {
    space();
    return at_ == end_;
  }

  const char *at() const { return at_; }

 private:
  void space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\r' || *at_ == '\t')) ++at_;
  }

  bool escape(std::string *out) {
    if (end_ - at_ < 2) return false;
    const char c = at_[1];
    at_ += 2;
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (const char *found = c ? strchr(from, c) : nullptr) {
      out->push_back(to[found - from]);
      return true;
    }
    uint32_t code = 0;
    if (c != 'u' || end_ - at_ < 4) return false;
    for (int i = 0; i < 4; ++i) {
      const char digit = *at_++;
      const char *digits = "0123456789abcdef", *found = strchr(digits, digit | 0x20);
      if (!digit || !found) return false;
      code = code * 16 + static_cast<uint32_t>(found - digits);
    }
    // Surrogate pairs stay two halves: names are compared with each other alone.
    if (code >= 0x800) {
      out->push_back(static_cast<char>(0xe0 | code >> 12));
      out->push_back(static_cast<char>(0x80 | (code >> 6 & 0x3f)));
    } else if (code >= 0x80) {
      out->push_back(static_cast<char>(0xc0 | code >> 6));
    }
    out->push_back(static_cast<char>(code >= 0x80 ? 0x80 | (code & 0x3f) : code));
    return true;
  }

  const char *at_, *end_;
};

bool read_tensor(Json *json, NetTensor *t, int64_t *offsets) {
  std::string type;
  int64_t seen = 0, count = 0;
  const bool well = json->object([&](const std::string &key) {
    if (key == "dtype") return ++seen, json->string(&type);
    if (key == "shape") return ++seen, json->numbers(t->shape, SPIKENM_RANK, &t->rank);
    return key == "data_offsets" && (++seen, json->numbers(offsets, 2, &count)) && count == 2;
  });
  t->dtype = -1;
  for (int i = 0; i < 6; ++i)
    if (type == kTypes[i]) t->dtype = i;
  return well && seen == 3;
}

}  // namespace

bool NetImage::read(const uint8_t *bytes, size_t size, NetFailure *fail) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file is little-endian");
  uint64_t header = 0;
  if (size < 8) return (*fail)("it is too short for a network's file");
  memcpy(&header, bytes, 8);
  if (header > size - 8 && __builtin_bswap64(header) <= size - 8)
    return (*fail)("its numbers have the other byte order; save it again on a little-endian machine");
  if (header > size - 8) return (*fail)("its header is longer than the file: truncated, no network");
  const char *text = reinterpret_cast<const char *>(bytes) + 8;
  const uint8_t *data = bytes + 8 + header;
  const int64_t room = static_cast<int64_t>(size - 8 - header);
  Json json(text, text + header);
  const char *digest = nullptr;
  const bool well = json.object([&](const std::string &name) {
    if (name == "__metadata__")
      return json.object([&](const std::string &key) {
        std::string &value = metadata[key];
        if (!json.string(&value)) return false;
        if (key == "digest" && value.size() == 64) digest = json.at() - 65;
        return true;
      });
    NetTensor t = {};
    int64_t at[2], items = 1;
    if (!read_tensor(&json, &t, at)) return false;
    if (t.dtype < 0) return true;  // of a type that no operation reads
    for (int64_t i = 0; i < t.rank; ++i)
      if (__builtin_mul_overflow(items, t.shape[i], &items)) return false;
    if (at[0] > at[1] || at[1] > room || (at[1] - at[0]) % kBytes[t.dtype] ||
        (at[1] - at[0]) / kBytes[t.dtype] != items)
      return false;
    t.data = data + at[0];
    t.bytes = at[1] - at[0];
    return tensors.emplace(name, t).second;
  });
  if (!well || !json.ended()) return (*fail)("its header is damaged, or it is no safetensors file");
  if (metadata["format"] != "spikenm_fx.packed" || !metadata.count("program"))
    return (*fail)("it holds no network: save one with engine.save()");
  if (metadata["program_version"] != "1" && metadata["program_version"] != "2")
    return (*fail)("it is of program version %.20s; this release reads versions 1 and 2: install a "
                   "newer release, or save the engine again", metadata["program_version"].c_str());
  if (!digest) return (*fail)("it carries no digest: it was changed after it was written");
  Sha256 sum;
  char zeros[64], hex[64];
  memset(zeros, '0', 64);
  const char *start = reinterpret_cast<const char *>(bytes);
  sum.add(start, static_cast<size_t>(digest - start));
  sum.add(zeros, 64);
  sum.add(digest + 64, size - static_cast<size_t>(digest + 64 - start));
  sum.finish(hex);
  if (memcmp(hex, digest, 64) != 0)
    return (*fail)("it does not match its digest: it was changed or damaged after it was written");
  return names(fail);
}

// The tensors in the order in which operations number them.
bool NetImage::names(NetFailure *fail) {
  const std::string &list = metadata["program"];
  for (size_t from = 0; from < list.size();) {
    const size_t end = list.find('\n', from);
    if (end == std::string::npos) return (*fail)("its list of tensors is damaged");
    const auto found = tensors.find(list.substr(from, end - from));
    if (found == tensors.end()) return (*fail)("it lacks a tensor that its program reads");
    order.push_back(&found->second);
    from = end + 1;
  }
  return !order.empty() || (*fail)("it holds no program");
}
