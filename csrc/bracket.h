// A guess, from a sample, of where the k-th largest entry lies.
#pragma once

#include <cstdint>

#include "importance_source.h"

namespace gradpruner {

// Entries whose bit pattern p has low <= p <= high.
struct Bracket {
  uint32_t low = kSmallestPositive;
  uint32_t high = kInfinity;
  double share = 0;  // of all entries, expected inside; 0 if it was not estimated
};

// The bracket holds the k-th largest entry with high probability. The caller must check that it does.
Bracket guess_bracket(const Sample& sample, double share_kept);

}  // namespace gradpruner
