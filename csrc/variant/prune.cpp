// The `kept` most important of each group of a row, without sorting.
//
// The importance of a row becomes ranks. An entry whose rank is below `kept` is kept. In small groups, the rank is the
// number of more important entries. In large groups it follows from the exact boundary, which a bracket on the bit
// patterns finds. The ranks become the mask of the row, and the mask zeroes the weight while the row is in the cache.
#include "between.h"
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

constexpr int64_t kSmallGroup = 32;  // also the entries that are ranked at a time

// ---- small groups

// Entry l of a step is compared with the one `turn` places behind it in its group. ~0 where that wraps around, so that
// the other entry lies before it.
struct Turns {
  uint32_t wraps[kSmallGroup][kSmallGroup];
};

void set_turns(int64_t group, Turns& turns) {
  for (int64_t turn = 1; turn < group; ++turn) {
    for (int64_t l = 0; l < kSmallGroup; ++l) turns.wraps[turn][l] = l % group + turn < group ? 0 : ~0u;
  }
}

// ranks[i] = how many of its group are more important than entry i, or as important and before it. Reads kSmallGroup
// entries on either side of the row and writes as many after it.
void rank_by_counting(const float* row, int64_t count, int64_t group, const Turns& turns, float* ranks) {
  const int64_t used = kSmallGroup / group * group;
  for (int64_t i = 0; i < count; i += used) {
    const float* own = row + i;
    int32_t ahead[kSmallGroup] = {};
    for (int64_t turn = 1; turn < group; ++turn) {
      const float *after = own + turn, *before = after - group;
      for (int64_t l = 0; l < kSmallGroup; ++l) {
        const uint32_t later = bits_of(after[l]);
        const uint32_t earlier = bits_of(before[l]) + 1;  // an equal one that lies before it ranks first
        const uint32_t other = later ^ ((later ^ earlier) & turns.wraps[turn][l]);
        ahead[l] += static_cast<int32_t>(other) > static_cast<int32_t>(bits_of(own[l]));
      }
    }
    memcpy(ranks + i, ahead, sizeof(ahead));
  }
}

// ---- large groups

// The k-th largest pattern lies in [low, high). The counts say how many entries are at least `low`, and at least
// `high`.
struct Bracket {
  uint32_t low, high;
  int64_t from_low, from_high;
};

// Narrows the bracket until `enough` entries are left in it, or one pattern. It moves away from the guess in growing
// steps until the k-th largest is between its ends, then it bisects. count_from(p): how many entries are at least p.
template <class Count>
void narrow_bracket(int64_t k, int64_t enough, uint32_t guess, Bracket& bracket, Count count_from) {
  uint32_t step = 1u << 18;  // 3 % of the value or less: holds about one entry of 64
  uint32_t middle = guess;
  for (; bracket.high - bracket.low > 1 && bracket.from_low - bracket.from_high > enough; step *= 2) {
    if (middle <= bracket.low || middle >= bracket.high) middle = bracket.low + (bracket.high - bracket.low) / 2;
    const int64_t from = count_from(middle);
    if (from >= k) {
      bracket.low = middle, bracket.from_low = from;
      middle += step;
    } else {
      bracket.high = middle, bracket.from_high = from;
      middle -= step;
    }
  }
}

// The bracket that holds one pattern, that of the k-th largest.
Bracket kth_largest(const float* entries, int64_t count, int64_t k, uint32_t guess, uint32_t* found) {
  Bracket bracket = {0, kInfinity + 1, count, 0};
  narrow_bracket(k, count / 64, guess, bracket, [&](uint32_t low) {
    return count_between(entries, count, low, kInfinity);
  });
  if (bracket.high - bracket.low == 1) return bracket;
  const int64_t above = bracket.from_high;
  const int64_t inside = collect(entries, count, bracket.low, bracket.high - 1, found, found + count + 1).inside;
  Bracket rest = {bracket.low, bracket.high, inside, 0};
  narrow_bracket(k - above, 0, 0, rest, [&](uint32_t low) {
    uint32_t from = 0;
    for (int64_t i = 0; i < inside; ++i) from += found[i] >= low;
    return int64_t{from};
  });
  return {rest.low, rest.high, above + rest.from_low, above + rest.from_high};
}

// The place after the n-th entry with this pattern. There must be that many. Reads up to 64 entries past the end.
int64_t after_nth(const float* entries, uint32_t pattern, int64_t n) {
  int64_t first = 0;
  uint64_t equal = mask_between(entries, pattern, 1);
  for (int64_t here; (here = __builtin_popcountll(equal)) < n; n -= here) {
    first += 64;
    equal = mask_between(entries + first, pattern, 1);
  }
  for (; n > 1; --n) equal &= equal - 1;
  return n ? first + __builtin_ctzll(equal) + 1 : 0;
}

// Replaces entries by rank 0 if they are kept, and by rank `kept` otherwise. Returns the boundary, which is the
// guess for the next group.
uint32_t rank_by_boundary(float* entries, int64_t count, int64_t kept, uint32_t guess, uint32_t* found) {
  const Bracket edge = kth_largest(entries, count, kept, guess, found);
  const int64_t ties = kept - edge.from_high;
  const bool all = edge.from_low == kept;
  const int64_t end = all ? count : after_nth(entries, edge.low, ties);
  const float other = float_of(static_cast<uint32_t>(kept));
  for (int64_t i = 0; i < end; ++i) entries[i] = bits_of(entries[i]) >= edge.low ? 0.0f : other;
  for (int64_t i = end; i < count; ++i) entries[i] = bits_of(entries[i]) > edge.low ? 0.0f : other;
  return edge.low;
}

// ---- both

// Bit i of the mask says whether rank i is below `kept`. No bit past the last is set. Reads up to 64 ranks past
// the end.
void pack(const float* ranks, int64_t count, int64_t kept, uint8_t* mask) {
  for (int64_t i = 0; i < count; i += 64) {
    uint64_t bits = mask_between(ranks + i, 0, static_cast<uint32_t>(kept));
    if (count - i < 64) bits &= (uint64_t{1} << (count - i)) - 1;
    const int64_t bytes = smaller(8, (count - i + 7) / 8);
    for (int64_t byte = 0; byte < bytes; ++byte) mask[i / 8 + byte] = static_cast<uint8_t>(bits >> 8 * byte);
  }
}

}  // namespace

void prune_rows(const WeightImportance& by, int64_t kept, int64_t group, int64_t first, int64_t rows, uint8_t* mask,
                float* ranked, uint32_t* found) {
  const int64_t count = by.in;
  float* row = ranked + kRowMargin;
  float* ranks = row + count + 2 * kRowMargin;
  Turns turns;
  if (group <= kSmallGroup) set_turns(group, turns);
  uint32_t guess = kInfinity / 2;
  for (int64_t i = first; i < first + rows; ++i) {
    weight_importance(by, i, 1, row);
    if (group <= kSmallGroup) {
      rank_by_counting(row, count, group, turns, ranks);
    } else {
      for (int64_t start = 0; start < count; start += group) {
        guess = rank_by_boundary(row + start, group, kept, guess, found);
      }
    }
    uint8_t* row_mask = mask + i * ((count + 7) / 8);
    pack(group <= kSmallGroup ? ranks : row, count, kept, row_mask);
    apply_mask(static_cast<char*>(by.weight) + i * count * size_of(by.dtype), by.dtype, count, row_mask);
  }
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
