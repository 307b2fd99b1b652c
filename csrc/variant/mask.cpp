// Zeroes entries by a mask of one bit per entry.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

// Eight entries per byte of the mask, in vectors. They are written out, since no compiler makes vectors of the loop.
template <class Bits>
void zero_unset(void* weight, int64_t count, const uint8_t* __restrict mask) {
  constexpr int64_t kLanes = smaller(8, GRADPRUNER_VECTOR_BYTES / sizeof(Bits)), kParts = 8 / kLanes;
  typedef Bits Part __attribute__((vector_size(kLanes * sizeof(Bits)), aligned(sizeof(Bits)), may_alias));
  Part places[kParts];
  for (int64_t bit = 0; bit < 8; ++bit) places[bit / kLanes][bit % kLanes] = Bits{1} << bit;
  auto* part = static_cast<Part*>(weight);
  for (int64_t byte = 0; byte < count / 8; ++byte, part += kParts) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kParts; ++i) part[i] &= reinterpret_cast<Part>((places[i] & Bits{mask[byte]}) != 0);
  }
  typedef Bits One __attribute__((may_alias));
  auto* one = static_cast<One*>(weight);
  for (int64_t i = count / 8 * 8; i < count; ++i) one[i] = mask[i / 8] >> i % 8 & 1 ? one[i] : 0;
}

}  // namespace

void apply_mask(void* weight, DType dtype, int64_t count, const uint8_t* mask) {
  switch (size_of(dtype)) {
    case 2:
      return zero_unset<uint16_t>(weight, count, mask);
    case 4:
      return zero_unset<uint32_t>(weight, count, mask);
    default:
      return zero_unset<uint64_t>(weight, count, mask);
  }
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
