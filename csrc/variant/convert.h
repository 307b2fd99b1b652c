// Conversions of the four element types: exact when widening, to nearest even when narrowing. They have no branches, so
// that loops vectorise.
#pragma once

#include "variant.h"

namespace gradpruner::GRADPRUNER_VARIANT {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float magnitude(float value) { return float_of(bits_of(value) & 0x7FFFFFFFu); }

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

static inline float widen(Float16 value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7FFFu} << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // Inf and NaN: the exponent becomes all ones
  // A subnormal is a normal number of exponent 2^-14 minus the hidden one of that exponent.
  const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  const uint32_t finite = exponent == 0 ? subnormal : normal;
  const uint32_t result = exponent == 0x0F800000u ? special : finite;
  return float_of(result | uint32_t{value.bits & 0x8000u} << 16);
}

template <class T>
static inline T narrow(float value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline double narrow<double>(float value) {
  return value;
}

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x0040u;  // rounding could turn a NaN into Inf or zero
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > kInfinity ? quiet_nan : rounded)};
}

template <>
inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + (magnitude >> 13 & 1u)) >> 13;
  // After adding 0.5, the 10 bits of a subnormal are at the end of the mantissa, rounded by the addition.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > kInfinity ? 0x7E00u : 0x7C00u;
  const uint32_t result = magnitude >= (143u << 23) ? special : finite;
  return {static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
}

// A float64 goes through float32, as torch's own conversion does.
template <class T>
static inline T narrow(double value) {
  return narrow<T>(static_cast<float>(value));
}

template <>
inline double narrow<double>(double value) {
  return value;
}

static inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Calls body with `data` as a pointer to the element type that `dtype` names.
template <class Body>
static inline auto with_type(void* data, DType dtype, Body body) {
  switch (dtype) {
    case DType::bfloat16:
      return body(static_cast<BFloat16*>(data));
    case DType::float16:
      return body(static_cast<Float16*>(data));
    case DType::float64:
      return body(static_cast<double*>(data));
    default:
      return body(static_cast<float*>(data));
  }
}

template <class Body>
static inline auto with_type(Array array, Body body) {
  switch (array.dtype) {
    case DType::bfloat16:
      return body(static_cast<const BFloat16*>(array.data));
    case DType::float16:
      return body(static_cast<const Float16*>(array.data));
    case DType::float64:
      return body(static_cast<const double*>(array.data));
    default:
      return body(static_cast<const float*>(array.data));
  }
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
