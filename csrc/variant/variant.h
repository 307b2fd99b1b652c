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

template <class Vector, class Scalar>
static inline Vector load(const Scalar* address) {
  Vector vector;
  memcpy(&vector, address, sizeof(vector));
  return vector;
}

template <class Vector, class Scalar>
static inline void store(Scalar* address, Vector vector) {
  memcpy(address, &vector, sizeof(vector));
}

static inline double lane_sum(DoubleVector vector) {
  double sum = 0;
  for (int64_t lane = 0; lane < kDoubleLanes; ++lane) sum += vector[lane];
  return sum;
}

static inline int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }
static inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
