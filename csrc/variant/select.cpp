// Finds the k-th largest float. The bits of positive floats, read as integers, order as the floats do.
#include "between.h"
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

// One unsigned comparison tests both bounds, since a pattern below `low` wraps around to a large number. Zero, NaN and
// negative floats have patterns outside of the bounds.
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

Collected collect(const float* f, int64_t count, uint32_t low, uint32_t high, uint32_t* bits, uint32_t* offsets) {
  const uint32_t inside = high - low + 1;
  const uint32_t beyond = kInfinity - high;  // so many patterns lie above `high`
  constexpr uint64_t kLast = uint64_t{1} << 63;
  Collected seen = {0, 0};
  const auto take = [&](int64_t i) {
    bits[seen.inside] = bits_of(f[i]);
    offsets[seen.inside] = static_cast<uint32_t>(i);
  };
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    seen.above += __builtin_popcountll(mask_between(f + i, high + 1, beyond));
    uint64_t mask = mask_between(f + i, low, inside);
    // Few entries are candidates, and which ones cannot be predicted. So two of 64 are always taken, whether they exist
    // or not, without a branch that would be mispredicted.
    for (int n = 0; n < 2; ++n) {
      take(i + __builtin_ctzll(mask | kLast));
      seen.inside += mask != 0;
      mask &= mask - 1;
    }
    for (; mask; mask &= mask - 1, ++seen.inside) take(i + __builtin_ctzll(mask));
  }
  for (; i < count; ++i) {
    const uint32_t entry = bits_of(f[i]);
    take(i);
    seen.inside += entry - low < inside;
    seen.above += entry - (high + 1) < beyond;
  }
  return seen;
}

void histogram(const float* f, int64_t count, uint32_t low, uint32_t high, int shift, uint32_t mask,
               int64_t* buckets) {
  for (int64_t i = 0; i < count; ++i) {
    if (between(f[i], low, high - low)) ++buckets[bits_of(f[i]) >> shift & mask];
  }
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
