// weight += sum_k scale_k mask_k [sign(donor_k) = sign(weight)] donor_k, a block of entries at a time.
//
// Multiply and add are rounded separately, as torch does. An entry that receives nothing is not written back
// through a conversion: it keeps its bits.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

constexpr int64_t kBlock = 512;

// Chosen by value: a choice between two structs in memory does not vectorise.
template <class T>
T choose(int32_t first, T left, T right) {
  return first ? left : right;
}
BFloat16 choose(int32_t first, BFloat16 left, BFloat16 right) {
  return {static_cast<uint16_t>(first ? left.bits : right.bits)};
}
Float16 choose(int32_t first, Float16 left, Float16 right) {
  return {static_cast<uint16_t>(first ? left.bits : right.bits)};
}

template <class T, class Wide>
void add_donor(const T* __restrict donor, const float* __restrict importance, float value, int32_t last, Wide scale,
               const Wide* __restrict original, Wide* __restrict sum, int32_t* __restrict changed, int64_t count) {
  for (int32_t i = 0; i < static_cast<int32_t>(count); ++i) {
    const Wide v = widen(donor[i]);
    const Wide w = original[i];
    const float f = importance[i];
    const int32_t kept = (f > 0) & ((f > value) | ((f == value) & (i <= last)));
    const int32_t agree = ((v > 0) & (w > 0)) | ((v < 0) & (w < 0));
    const int32_t take = kept & agree;
    const Wide added = sum[i] + scale * v;
    sum[i] = take ? added : sum[i];
    changed[i] |= take;
  }
}

template <class Wide, class T>
void merge_block(T* weight, int64_t first, int64_t count, const MergeTerm* terms, int64_t term_count) {
  Wide original[kBlock], sum[kBlock];
  int32_t changed[kBlock] = {};
  for (int64_t i = 0; i < count; ++i) sum[i] = original[i] = widen(weight[i]);
  for (int64_t k = 0; k < term_count; ++k) {
    const MergeTerm& term = terms[k];
    const int64_t last = smaller(kBlock, term.last - first);
    add_donor(static_cast<const T*>(term.donor) + first, term.importance + first, term.value,
              static_cast<int32_t>(last < 0 ? -1 : last), static_cast<Wide>(term.scale), original, sum, changed,
              count);
  }
  for (int64_t i = 0; i < count; ++i) {
    weight[i] = choose(changed[i], narrow<T>(sum[i]), weight[i]);
  }
}

}  // namespace

void merge(void* weight, DType dtype, int64_t count, const MergeTerm* terms, int64_t term_count) {
  with_type(weight, dtype, [&](auto* entries) {
    using Wide = decltype(widen(*entries));
    for (int64_t first = 0; first < count; first += kBlock) {
      merge_block<Wide>(entries + first, first, smaller(kBlock, count - first), terms, term_count);
    }
  });
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
