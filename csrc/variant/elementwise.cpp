// Kernels that make one pass over memory.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

template <class T>
void accumulate(float* __restrict igia, const T* __restrict grad, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(widen(grad[i]));
    igia[i] += value * value;
  }
}

// The exponent bits. They are all ones in Inf and NaN, and only there.
template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = uint32_t;
  static constexpr Bits mask = 0x7F800000u;
};
template <>
struct Exponent<BFloat16> {
  using Bits = uint16_t;
  static constexpr Bits mask = 0x7F80u;
};
template <>
struct Exponent<Float16> {
  using Bits = uint16_t;
  static constexpr Bits mask = 0x7C00u;
};
template <>
struct Exponent<double> {
  using Bits = uint64_t;
  static constexpr Bits mask = 0x7FF0000000000000u;
};

template <class T>
bool finite(const T* data, int64_t count) {
  using Bits = typename Exponent<T>::Bits;
  constexpr int64_t kBlock = 4096;  // long enough to vectorise, short enough to stop early
  for (int64_t first = 0; first < count; first += kBlock) {
    Bits found = 0;
    for (int64_t i = first, end = smaller(first + kBlock, count); i < end; ++i) {
      Bits bits;
      memcpy(&bits, data + i, sizeof(bits));
      found |= static_cast<Bits>((bits & Exponent<T>::mask) == Exponent<T>::mask);
    }
    if (found) return false;
  }
  return true;
}

}  // namespace

void square_accumulate(float* igia, Array grad, int64_t count) {
  with_type(grad, [&](auto* entries) { accumulate(igia, entries, count); });
}

bool all_finite(Array data, int64_t count) {
  return with_type(data, [&](auto* entries) { return finite(entries, count); });
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
