// Included by the sources that are compiled once per instruction set. GRADPRUNER_VARIANT names the namespace, so
// that no two variants define the same symbol; helpers are static and use no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels.h"

#if defined(__AVX512F__)
#define GRADPRUNER_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GRADPRUNER_VECTOR_BYTES 32
#else
#define GRADPRUNER_VECTOR_BYTES 16
#endif

namespace gradpruner::GRADPRUNER_VARIANT {

typedef float FloatVector __attribute__((vector_size(GRADPRUNER_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(GRADPRUNER_VECTOR_BYTES)));
constexpr int64_t kFloatLanes = GRADPRUNER_VECTOR_BYTES / sizeof(float);
constexpr int64_t kDoubleLanes = GRADPRUNER_VECTOR_BYTES / sizeof(double);

// Vectors are not loaded by memcpy, which would put an array of vectors into memory. A loop over it should stay in
// registers.
template <class Vector>
struct Unaligned {
  typedef Vector Type __attribute__((aligned(1), may_alias));
};

template <class Vector, class Scalar>
static inline Vector load(const Scalar* address) {
  return *reinterpret_cast<const typename Unaligned<Vector>::Type*>(address);
}

template <class Vector, class Scalar>
static inline void store(Scalar* address, Vector vector) {
  *reinterpret_cast<typename Unaligned<Vector>::Type*>(address) = vector;
}

// As many entries as a vector of doubles has.
template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  typedef float Vector __attribute__((vector_size(GRADPRUNER_VECTOR_BYTES / 2)));
};
template <>
struct Narrow<double> {
  using Vector = DoubleVector;
};

template <class T>
static inline DoubleVector load_double(const T* data) {
  return __builtin_convertvector(load<typename Narrow<T>::Vector>(data), DoubleVector);
}

static inline double lane_sum(DoubleVector vector) {
  double sum = 0;
  for (int64_t lane = 0; lane < kDoubleLanes; ++lane) sum += vector[lane];
  return sum;
}

static constexpr int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }
static inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
