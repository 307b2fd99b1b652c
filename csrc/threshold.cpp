// The exact k-th largest entry and its last kept tie.
//
// A large source is sampled first. The sample gives a bracket that is all but sure to hold the answer, so one pass
// counts what lies above the bracket and collects what lies inside. Where the guess fails, or ties are too many to
// collect, a radix selection on the bit patterns (11 + 11 + 10 bits) finds the same answer in more passes.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "bracket.h"
#include "importance_source.h"
#include "kernels.h"
#include "ops.h"

namespace gradpruner {

namespace {

constexpr int64_t kSmall = 1 << 18;  // as many entries are collected without a thought
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
constexpr Threshold kNothing{std::numeric_limits<float>::infinity(), -1};

struct Level {
  int shift;
  uint32_t mask;
};
constexpr Level kLevels[] = {{21, 0x7FF}, {10, 0x7FF}, {0, 0x3FF}};

struct Collected {
  int64_t above = 0;
  std::vector<Candidate> candidates;
};

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The most important first; of equals, the one with the lower index.
bool precedes(const Candidate& left, const Candidate& right) {
  return left.bits != right.bits ? left.bits > right.bits : left.index < right.index;
}

// Adds up one table of counts for each worker.
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
    if (auto collected = collect(bracket, 0, source_.size(), collectable())) {
      if (auto answer = pick(std::move(*collected), bracket, k)) return *answer;
    }
    return by_radix(k);
  }

 private:
  int64_t collectable() const { return std::max(kSmall, source_.size() / 8); }
  std::vector<std::vector<int64_t>> tables(size_t size) const {
    return std::vector<std::vector<int64_t>>(static_cast<size_t>(source_.workers()), std::vector<int64_t>(size));
  }

  // Nothing if there are more candidates than `limit`.
  std::optional<Collected> collect(Bracket bracket, int64_t first, int64_t end, int64_t limit) const {
    std::vector<Collected> parts(static_cast<size_t>(source_.workers()));
    std::atomic<int64_t> found{0};
    std::atomic<bool> too_many{false};
    source_.visit(first, end, too_many, [&](const Span& span) {
      Collected& part = parts[static_cast<size_t>(span.worker)];
      part.above += kernels().count_between(span.f, span.count, bracket.high + 1, kInfinity);
      const size_t before = part.candidates.size();
      part.candidates.resize(before + static_cast<size_t>(span.count));
      const int64_t added = kernels().collect(span.f, span.count, bracket.low, bracket.high, span.first,
                                              part.candidates.data() + before);
      part.candidates.resize(before + static_cast<size_t>(added));
      if ((found += added) > limit) too_many = true;
    });
    if (too_many) return std::nullopt;
    Collected all = std::move(parts.front());
    for (size_t i = 1; i < parts.size(); ++i) {
      all.above += parts[i].above;
      all.candidates.insert(all.candidates.end(), parts[i].candidates.begin(), parts[i].candidates.end());
    }
    return all;
  }

  // Nothing if the bracket does not hold the answer.
  static std::optional<Threshold> pick(Collected collected, Bracket bracket, int64_t k) {
    const int64_t seen = collected.above + static_cast<int64_t>(collected.candidates.size());
    if (bracket.low == kSmallestPositive) k = std::min(k, seen);  // no more entries are positive
    if (k == 0) return kNothing;
    if (k <= collected.above || k > seen) return std::nullopt;
    const auto place = collected.candidates.begin() + (k - collected.above - 1);
    std::nth_element(collected.candidates.begin(), place, collected.candidates.end(), precedes);
    return Threshold{float_of(place->bits), place->index};
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
      bracket = {std::max(prefix, bracket.low), std::min(prefix + ((1u << level.shift) - 1), bracket.high)};
      if (counts[bucket] <= collectable()) {
        return *pick(*collect(bracket, 0, source_.size(), kUnlimited), bracket, k);
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
    const Bracket bracket{bits, bits};
    Collected found = *collect(bracket, first, std::min(first + range, source_.size()), kUnlimited);
    const auto place = found.candidates.begin() + (n - 1);
    std::nth_element(found.candidates.begin(), place, found.candidates.end(), precedes);
    return place->index;
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
