// A float and its bit pattern, for what is compiled once. The variants have their own, in variant/convert.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace gradpruner {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace gradpruner
