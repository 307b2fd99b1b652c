// weight += sum_k scale_k mask_k [sign(donor_k) = sign(weight)] donor_k, a block of entries at a time.
//
// Each donor has a loop over the block. The first loop reads the weight, and the last one writes it. Between them the
// sums stay in the first-level cache. A single donor needs no sums in memory, and no blocks. Longer blocks are slower:
// arrays of one size tend to start at the same offset in a page, and push each other out of that cache. Multiply and
// add are rounded separately, as in torch.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

constexpr int64_t kBlock = 256;

// Chosen by value: a choice between two structs in memory does not vectorise.
template <class T>
T choose(bool first, T left, T right) {
  return first ? left : right;
}
BFloat16 choose(bool first, BFloat16 left, BFloat16 right) {
  return {static_cast<uint16_t>(first ? left.bits : right.bits)};
}
Float16 choose(bool first, Float16 left, Float16 right) {
  return {static_cast<uint16_t>(first ? left.bits : right.bits)};
}

// Whether both are above zero or both below. A zero or a NaN agrees with nothing. All operators are bitwise, since a
// branch would keep the loop from becoming vectors.
bool agree(float v, float w) {
  const uint32_t v_bits = bits_of(v), w_bits = bits_of(w);
  const bool both = ((v_bits & 0x7FFFFFFFu) - 1 < kInfinity) & ((w_bits & 0x7FFFFFFFu) - 1 < kInfinity);
  return both & ((v_bits ^ w_bits) < 0x80000000u);
}
bool agree(double v, double w) { return ((v > 0) & (w > 0)) | ((v < 0) & (w < 0)); }

// Adds one donor to `count` entries, kept where the bits of their importance are in [low, low + range).
template <bool First, bool Last, class T, class Wide>
void add_donor(T* __restrict weight, const T* __restrict donor, const float* __restrict importance, uint32_t low,
               uint32_t range, Wide scale, Wide* __restrict sum, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T raw = weight[i];
    const Wide w = widen(raw);
    const Wide v = widen(donor[i]);
    const Wide before = First ? w : sum[i];
    const bool take = (bits_of(importance[i]) - low < range) & agree(v, w);
    const Wide after = take ? before + scale * v : before;
    if (Last) {
      // A NaN keeps its bits. Any other entry to which nothing was added is unchanged by the conversion.
      weight[i] = choose(w == w, narrow<T>(after), raw);
    } else {
      sum[i] = after;
    }
  }
}

template <class T, class Wide>
void add_donor(bool first, bool last, T* weight, const T* donor, const float* importance, uint32_t low, Wide scale,
               Wide* sum, int64_t count) {
  const uint32_t range = kInfinity + 1 - low;
  if (first && last) {
    add_donor<true, true>(weight, donor, importance, low, range, scale, sum, count);
  } else if (first) {
    add_donor<true, false>(weight, donor, importance, low, range, scale, sum, count);
  } else if (last) {
    add_donor<false, true>(weight, donor, importance, low, range, scale, sum, count);
  } else {
    add_donor<false, false>(weight, donor, importance, low, range, scale, sum, count);
  }
}

template <class T>
void merge_block(T* weight, int64_t start, int64_t count, const MergeTerm* terms, int64_t term_count) {
  using Wide = decltype(widen(*weight));
  Wide sum[kBlock];
  for (int64_t k = 0; k < term_count; ++k) {
    const MergeTerm& term = terms[k];
    const T* donor = static_cast<const T*>(term.donor) + start;
    const float* importance = term.importance + start;
    const Wide scale = static_cast<Wide>(term.scale);
    const bool first = k == 0, last = k == term_count - 1;
    // Ties are kept up to an index. Up to there the lower bound is the value itself, behind it the next larger value.
    // A value that is NaN keeps nothing. A value that is not positive keeps every importance that counts.
    const uint32_t value = term.value > 0 ? bits_of(term.value) : term.value <= 0 ? 0 : kInfinity;
    const uint32_t without = value + 1;
    int64_t tied = term.value > 0 ? term.last + 1 - start : 0;
    tied = tied < 0 ? 0 : smaller(tied, count);
    add_donor(first, last, weight, donor, importance, value, scale, sum, tied);
    add_donor(first, last, weight + tied, donor + tied, importance + tied, without, scale, sum + tied, count - tied);
  }
}

}  // namespace

void merge(void* weight, DType dtype, int64_t count, const MergeTerm* terms, int64_t term_count) {
  with_type(weight, dtype, [&](auto* entries) {
    const int64_t block = term_count == 1 ? count : kBlock;
    for (int64_t start = 0; start < count; start += block) {
      merge_block(entries + start, start, smaller(block, count - start), terms, term_count);
    }
  });
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
