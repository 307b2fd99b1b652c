// Arrays of the four element types for the exercise, with conversions that share nothing with the kernels'.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "../../csrc/types.h"

using gradpruner::DType;

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16, DType::float64};

// A 16-bit format: bits of the mantissa, exponent of its smallest normal number.
struct Format {
  int mantissa, least;
};
constexpr Format kBFloat16{7, -126};
constexpr Format kFloat16{10, -14};

inline int exponent_field(Format format) { return 0x7FFF >> format.mantissa << format.mantissa; }

// Rounds to nearest even.
inline uint16_t encode(double value, Format format) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const int infinity = exponent_field(format);
  if (std::isnan(value)) return static_cast<uint16_t>(infinity | 1 << (format.mantissa - 1));
  const double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = magnitude == 0 ? format.least : std::max(std::ilogb(magnitude), format.least);
  // The leading one of a normal number carries into the exponent field, as does a mantissa that rounds up.
  const auto digits = static_cast<int>(std::nearbyint(std::ldexp(magnitude, format.mantissa - exponent)));
  return static_cast<uint16_t>(sign | std::min(((exponent - format.least) << format.mantissa) + digits, infinity));
}

inline double decode(uint16_t bits, Format format) {
  const int field = (bits & exponent_field(format)) >> format.mantissa;
  const int digits = bits & ((1 << format.mantissa) - 1);
  double magnitude = std::ldexp(digits, format.least - format.mantissa);
  if (field == exponent_field(format) >> format.mantissa) {
    magnitude = digits ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (field > 0) {
    magnitude = std::ldexp(digits + (1 << format.mantissa), field - 1 + format.least - format.mantissa);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

// `count` entries that end where their memory ends, so that any access past them is past the allocation. They start
// `lead` entries after an address that suits every vector.
class Elements {
 public:
  Elements(DType dtype, int64_t count, int64_t lead)
      : dtype_(dtype), count_(count), lead_(lead), block_(allocate(bytes(lead + count))) {}
  Elements(const Elements& other) : Elements(other.dtype_, other.count_, other.lead_) {
    if (count_ > 0) std::memcpy(data(), other.data(), bytes(count_));
  }
  Elements(Elements&&) = default;

  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  // An array of no entries has no address, as an empty tensor has none.
  void* data() { return count_ > 0 ? block_.get() + bytes(lead_) : nullptr; }
  const void* data() const { return count_ > 0 ? block_.get() + bytes(lead_) : nullptr; }
  float* floats() { return static_cast<float*>(data()); }
  const float* floats() const { return static_cast<const float*>(data()); }
  gradpruner::Array array() const { return {data(), dtype_}; }

  double get(int64_t i) const {
    switch (dtype_) {
      case DType::float32:
        return at<float>(i);
      case DType::float64:
        return at<double>(i);
      default:
        return decode(at<uint16_t>(i), format());
    }
  }

  // To 16 bits through float, as torch converts.
  void set(int64_t i, double value) {
    switch (dtype_) {
      case DType::float32:
        return put(i, static_cast<float>(value));
      case DType::float64:
        return put(i, value);
      default:
        return put(i, encode(static_cast<float>(value), format()));
    }
  }

  // The first entry that differs, or -1. With `any_nan` one NaN is as good as another.
  int64_t first_difference(const Elements& other, bool any_nan) const {
    if (count_ == 0 || std::memcmp(data(), other.data(), bytes(count_)) == 0) return -1;
    for (int64_t i = 0; i < count_; ++i) {
      if (std::memcmp(address(i), other.address(i), bytes(1)) == 0) continue;
      if (!any_nan || !std::isnan(get(i)) || !std::isnan(other.get(i))) return i;
    }
    return -1;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(unsigned char* block) const { ::operator delete(block, kAlignment); }
  };
  using Block = std::unique_ptr<unsigned char, Free>;
  static Block allocate(size_t size) {
    return Block(static_cast<unsigned char*>(::operator new(size, kAlignment)));
  }

  size_t bytes(int64_t entries) const {
    const size_t size = dtype_ == DType::float64 ? 8 : dtype_ == DType::float32 ? 4 : 2;
    return static_cast<size_t>(entries) * size;
  }
  Format format() const { return dtype_ == DType::bfloat16 ? kBFloat16 : kFloat16; }
  const unsigned char* address(int64_t i) const { return block_.get() + bytes(lead_ + i); }

  template <class T>
  T at(int64_t i) const {
    T value;
    std::memcpy(&value, address(i), sizeof(value));
    return value;
  }
  template <class T>
  void put(int64_t i, T value) {
    std::memcpy(block_.get() + bytes(lead_ + i), &value, sizeof(value));
  }

  DType dtype_;
  int64_t count_, lead_;
  Block block_;
};
