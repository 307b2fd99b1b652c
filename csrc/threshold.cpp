// The exact k-th largest entry and its last kept tie.
//
// A large source is sampled first. The sample gives a bracket that holds the answer almost certainly. So one pass
// counts the entries above the bracket and collects those inside. If the guess fails, or if there are too many
// ties to collect, a radix selection on the bit patterns (11 + 11 + 10 bits) finds the same answer in more passes.
#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "bracket.h"
#include "float_bits.h"
#include "importance_source.h"
#include "kernels.h"
#include "ops.h"
#include "scratch.h"

namespace gradpruner {

namespace {

constexpr int64_t kSmall = 1 << 18;  // up to so many entries are collected without a bracket
constexpr int64_t kMostIndexed = int64_t{1} << 32;  // a candidate's index has 32 bits
constexpr uint32_t kBuckets = 1 << 12;
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
constexpr Threshold kNothing{std::numeric_limits<float>::infinity(), -1};

struct Level {
  int shift;
  uint32_t mask;
};
constexpr Level kLevels[] = {{21, 0x7FF}, {10, 0x7FF}, {0, 0x3FF}};

// Positive floats as their bit patterns, which order as the floats do, and their flat indices.
struct Candidates {
  int64_t above = 0;  // entries beyond the bracket
  std::vector<int64_t> counts;  // of candidates in each bucket of the bracket
  std::vector<uint32_t> bits;
  std::vector<uint32_t> indices;
};

struct Candidate {
  uint32_t bits;
  uint32_t index;
};

// The most important first. Of equal ones, that with the lower index.
bool precedes(const Candidate& left, const Candidate& right) {
  return left.bits != right.bits ? left.bits > right.bits : left.index < right.index;
}

// Sums the tables of counts, of which every worker has one.
std::vector<int64_t> add_up(const std::vector<std::vector<int64_t>>& tables) {
  std::vector<int64_t> total = tables.front();
  for (size_t worker = 1; worker < tables.size(); ++worker) {
    std::transform(total.begin(), total.end(), tables[worker].begin(), total.begin(), std::plus<>());
  }
  return total;
}

class Selection {
 public:
  explicit Selection(const ImportanceSource& source) : source_(source) {}

  Threshold kth_largest(int64_t k) const {
    Bracket bracket;
    if (source_.size() > kSmall) {
      bracket = guess_bracket(source_.sample(), static_cast<double>(k) / static_cast<double>(source_.size()));
    }
    if (source_.size() <= kMostIndexed) {
      if (auto collected = collect(bracket, 0, source_.size(), collectable())) {
        if (auto answer = pick(*collected, bracket, 0, k)) return *answer;
      }
    }
    return by_radix(k);
  }

 private:
  int64_t collectable() const { return std::max(kSmall, source_.size() / 8); }
  std::vector<std::vector<int64_t>> tables(size_t size) const {
    return std::vector<std::vector<int64_t>>(static_cast<size_t>(source_.workers()), std::vector<int64_t>(size));
  }

  static int bucket_shift(Bracket bracket) {
    int shift = 0;
    while ((bracket.high - bracket.low) >> shift >= kBuckets) ++shift;
    return shift;
  }

  // Returns one part per worker, or nothing if there are more candidates than `limit`.
  std::optional<std::vector<Candidates>> collect(Bracket bracket, int64_t first, int64_t end, int64_t limit) const {
    std::vector<Candidates> parts(static_cast<size_t>(source_.workers()));
    const double expected = 1.2 * bracket.share * static_cast<double>(end - first) / source_.workers();
    for (Candidates& part : parts) {
      part.counts.resize(kBuckets);
      part.bits.reserve(static_cast<size_t>(expected));
      part.indices.reserve(static_cast<size_t>(expected));
    }
    const int shift = bucket_shift(bracket);
    Scratch<uint32_t> bits(source_.workers(), kLongestSpan + 1);
    Scratch<uint32_t> offsets(source_.workers(), kLongestSpan + 1);
    std::atomic<int64_t> found{0};
    std::atomic<bool> too_many{false};
    source_.visit(first, end, too_many, [&](const Span& span) {
      Candidates& part = parts[static_cast<size_t>(span.worker)];
      uint32_t* new_bits = bits.of(span.worker);
      uint32_t* new_offsets = offsets.of(span.worker);
      const Collected seen =
          kernels().collect(span.f, span.count, bracket.low, bracket.high, new_bits, new_offsets);
      part.above += seen.above;
      if (seen.inside == 0) return;
      if ((found += seen.inside) > limit) too_many = true;
      const auto base = static_cast<uint32_t>(span.first - first);
      for (int64_t i = 0; i < seen.inside; ++i) {
        new_offsets[i] += base;
        ++part.counts[(new_bits[i] - bracket.low) >> shift];
      }
      part.bits.insert(part.bits.end(), new_bits, new_bits + seen.inside);
      part.indices.insert(part.indices.end(), new_offsets, new_offsets + seen.inside);
    });
    if (too_many) return std::nullopt;
    return parts;
  }

  // Returns nothing if the bracket does not hold the answer. First finds the bucket of the k-th largest.
  static std::optional<Threshold> pick(const std::vector<Candidates>& parts, Bracket bracket, int64_t first,
                                       int64_t k) {
    int64_t above = 0, seen = 0;
    for (const Candidates& part : parts) {
      above += part.above;
      seen += part.above + static_cast<int64_t>(part.bits.size());
    }
    if (bracket.low == kSmallestPositive) k = std::min(k, seen);  // no more entries are positive
    if (k == 0) return kNothing;
    if (k <= above || k > seen) return std::nullopt;
    const int shift = bucket_shift(bracket);
    std::vector<int64_t> counts(kBuckets);
    for (const Candidates& part : parts) {
      std::transform(counts.begin(), counts.end(), part.counts.begin(), counts.begin(), std::plus<>());
    }
    uint32_t bucket = kBuckets - 1;
    while (above + counts[bucket] < k) above += counts[bucket--];
    std::vector<Candidate> close;
    close.reserve(static_cast<size_t>(counts[bucket]));
    for (const Candidates& part : parts) {
      for (size_t i = 0; i < part.bits.size(); ++i) {
        if ((part.bits[i] - bracket.low) >> shift == bucket) close.push_back({part.bits[i], part.indices[i]});
      }
    }
    const auto place = close.begin() + (k - above - 1);
    std::nth_element(close.begin(), place, close.end(), precedes);
    return Threshold{float_of(place->bits), first + place->index};
  }

  std::vector<int64_t> histogram(Bracket bracket, Level level) const {
    auto counts = tables(level.mask + 1);
    source_.visit(0, source_.size(), never_, [&](const Span& span) {
      kernels().histogram(span.f, span.count, bracket.low, bracket.high, level.shift, level.mask,
                          counts[static_cast<size_t>(span.worker)].data());
    });
    return add_up(counts);
  }

  Threshold by_radix(int64_t k) const {
    Bracket bracket;
    uint32_t prefix = 0;
    int64_t above = 0;
    for (const Level level : kLevels) {
      const std::vector<int64_t> counts = histogram(bracket, level);
      if (prefix == 0 && level.shift == kLevels[0].shift) {
        k = std::min(k, std::accumulate(counts.begin(), counts.end(), int64_t{0}));
        if (k == 0) return kNothing;
      }
      uint32_t bucket = level.mask;
      while (above + counts[bucket] < k) above += counts[bucket--];
      prefix |= bucket << level.shift;
      bracket = {std::max(prefix, bracket.low), std::min(prefix + ((1u << level.shift) - 1), bracket.high), 0};
      if (counts[bucket] <= collectable() && source_.size() <= kMostIndexed) {
        return *pick(*collect(bracket, 0, source_.size(), kUnlimited), bracket, 0, k);
      }
    }
    return {float_of(prefix), nth_tie(prefix, k - above)};
  }

  // The flat index of the n-th entry, counted from 1, that equals `bits`.
  int64_t nth_tie(uint32_t bits, int64_t n) const {
    constexpr int64_t kRanges = 4096;
    const int64_t grains = (source_.size() + source_.grain() - 1) / source_.grain();
    const int64_t range = (grains + kRanges - 1) / kRanges * source_.grain();
    auto counts = tables(static_cast<size_t>((source_.size() + range - 1) / range));
    source_.visit(0, source_.size(), never_, [&](const Span& span) {
      counts[static_cast<size_t>(span.worker)][static_cast<size_t>(span.first / range)] +=
          kernels().count_between(span.f, span.count, bits, bits);
    });
    const std::vector<int64_t> ties = add_up(counts);
    int64_t number = 0;
    while (ties[static_cast<size_t>(number)] < n) n -= ties[static_cast<size_t>(number++)];
    const int64_t first = number * range;
    const Bracket bracket{bits, bits, 0};
    const auto found = *collect(bracket, first, std::min(first + range, source_.size()), kUnlimited);
    std::vector<uint32_t> indices;
    for (const Candidates& part : found) indices.insert(indices.end(), part.indices.begin(), part.indices.end());
    const auto place = indices.begin() + (n - 1);
    std::nth_element(indices.begin(), place, indices.end());
    return first + *place;
  }

  const ImportanceSource& source_;
  const std::atomic<bool> never_{false};
};

}  // namespace

Threshold threshold(const float* igia, int64_t count, int64_t k, int threads) {
  return Selection(*array_source(igia, count, threads)).kth_largest(k);
}

Threshold factor_threshold(const Factors& factors, int64_t k, int threads) {
  return Selection(*factor_source(factors, threads)).kth_largest(k);
}

}  // namespace gradpruner
