// Finding the k-th largest float: positive floats order as the integers that their bits spell.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

// One unsigned comparison tests both bounds: what lies below `low` wraps around to a large number. Zero, NaN and
// negative floats have patterns outside the bounds.
static inline bool between(float value, uint32_t low, uint32_t range) { return bits_of(value) - low <= range; }

int64_t count_between(const float* f, int64_t count, uint32_t low, uint32_t high) {
  if (low > high) return 0;
  constexpr int64_t kBlock = int64_t{1} << 30;  // counted in 32 bits, which vectorises better
  int64_t total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    uint32_t found = 0;
    for (int64_t i = first, end = smaller(first + kBlock, count); i < end; ++i) {
      found += between(f[i], low, high - low);
    }
    total += found;
  }
  return total;
}

int64_t collect(const float* f, int64_t count, uint32_t low, uint32_t high, int64_t first_index,
                Candidate* found) {
  constexpr int64_t kBlock = 128;
  int64_t size = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t length = smaller(kBlock, count - first);
    if (count_between(f + first, length, low, high) == 0) continue;
    for (int64_t i = first; i < first + length; ++i) {
      found[size] = {first_index + i, bits_of(f[i])};
      size += between(f[i], low, high - low);
    }
  }
  return size;
}

void histogram(const float* f, int64_t count, uint32_t low, uint32_t high, int shift, uint32_t mask,
               int64_t* buckets) {
  for (int64_t i = 0; i < count; ++i) {
    if (between(f[i], low, high - low)) ++buckets[bits_of(f[i]) >> shift & mask];
  }
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
