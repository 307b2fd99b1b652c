// Selections and importance from factors, against a full ranking.
#pragma once

#include "exercise_cases.h"

namespace {

// ---- selection

struct Entry {
  float value;
  int64_t index;
};

// The entries that can be kept, the most important first, of equals the one with the lower index.
std::vector<Entry> ranking(const float* f, int64_t count) {
  std::vector<Entry> entries;
  for (int64_t i = 0; i < count; ++i) {
    if (f[i] > 0) entries.push_back({f[i], i});
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& x, const Entry& y) { return x.value > y.value; });
  return entries;
}

Threshold boundary(const std::vector<Entry>& ranked, int64_t k) {
  const auto last = std::min<int64_t>(k, static_cast<int64_t>(ranked.size())) - 1;
  if (last < 0) return {std::numeric_limits<float>::infinity(), -1};
  return {ranked[static_cast<size_t>(last)].value, ranked[static_cast<size_t>(last)].index};
}

void check_boundary(Threshold got, const std::vector<Entry>& ranked, int64_t k, const std::string& what) {
  const Threshold expected = boundary(ranked, k);
  check(got.value == expected.value && got.index == expected.index,
        what + ", k " + std::to_string(k) + ": (" + std::to_string(got.value) + ", " + std::to_string(got.index) +
            "), expected (" + std::to_string(expected.value) + ", " + std::to_string(expected.index) + ")");
}

std::vector<int64_t> choices_of_k(int64_t count) {
  if (count >= kLarge / 2) return {count / 5, count / 2, count};
  std::vector<int64_t> choices{0};
  for (const int64_t k : {int64_t{1}, count / 5, count - 1, count}) {
    if (k > 0 && k <= count) choices.push_back(k);
  }
  return choices;
}

float positive(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Which entries of an array the selection's sample does not see.
std::vector<bool> hidden_from_sample(int64_t count) {
  std::vector<bool> hidden(static_cast<size_t>(count), true);
  if (count < kLarge) return hidden;  // no sample is taken
  std::vector<float> places(static_cast<size_t>(count));
  std::iota(places.begin(), places.end(), 0.0f);
  for (const float place : array_source(places.data(), count, 1)->sample().entries) {
    hidden[static_cast<size_t>(place)] = false;
  }
  return hidden;
}

// Which rows the sample of a matrix of factors does not see: the root of its importance is the row's number.
std::vector<bool> hidden_rows_of(int64_t out, int64_t in) {
  const Draw one = [](Random&) { return 1.0; };
  FactorSet set = make_factors(DType::float32, out, in, 1, 1, one, 0);
  for (int64_t row = 0; row < out; ++row) set.b.set(row, static_cast<double>(row));
  std::vector<bool> hidden(static_cast<size_t>(out), true);
  for (const float f : factor_source(set.factors(), 1)->sample().entries) {
    hidden[static_cast<size_t>(std::sqrt(f))] = false;
  }
  return hidden;
}

struct Pattern {
  const char* name;
  float (*entry)(Random&, bool hidden);
};

const Pattern kPatterns[] = {
    {"all zero", [](Random&, bool) { return 0.0f; }},
    {"all equal", [](Random&, bool) { return 1.5f; }},
    {"all infinite", [](Random&, bool) { return INFINITY; }},
    {"nothing positive", [](Random& random, bool) { return random() % 2 ? NAN : -1.0f; }},
    {"smooth", [](Random& random, bool) { return positive(0x3F800000u + random() % 0x800000u); }},
    {"every scale", [](Random& random, bool) { return positive(random() % 0x7F800001u); }},
    {"subnormal", [](Random& random, bool) { return positive(random() % 0x800000u); }},
    {"ties", [](Random& random, bool) { return static_cast<float>(random() % 5); }},
    {"few positive", [](Random& random, bool) { return random() % 100 == 0 ? 2.5f : 0.0f; }},
    {"special", [](Random& random, bool) { return static_cast<float>(special(random)); }},
    // What the sample does not see, alike in no bit, in 11 bits, in 22 bits, in all: so far the radix has to go.
    {"hidden", [](Random& random, bool hidden) {
       return positive(hidden ? 0x40000000u + random() % 0x3F000000u : random() % 0x3F000000u);
     }},
    {"hidden alike in 11 bits", [](Random& random, bool hidden) {
       return positive(hidden ? 0x60000000u + random() % 0x200000u : random() % 0x3F000000u);
     }},
    {"hidden alike in 22 bits", [](Random& random, bool hidden) {
       return positive(hidden ? 0x60000000u + random() % 0x400u : random() % 0x3F000000u);
     }},
    {"hidden alike", [](Random& random, bool hidden) {
       return positive(hidden ? 0x60000000u : random() % 0x3F000000u);
     }},
};

void threshold_case(const Pattern& pattern, int64_t count, int64_t lead) {
  Random random(20);
  const std::vector<bool> hidden = hidden_from_sample(count);
  Elements igia(DType::float32, count, lead);
  for (int64_t i = 0; i < count; ++i) igia.set(i, pattern.entry(random, hidden[static_cast<size_t>(i)]));
  const std::vector<Entry> ranked = ranking(igia.floats(), count);
  const std::string name = std::string(pattern.name) + " " + std::to_string(count) + " lead " + std::to_string(lead);
  exercise({"threshold", name, count == kLarge, [=](const std::string& what, int threads) {
              for (const int64_t k : choices_of_k(count)) {
                check_boundary(threshold(igia.floats(), count, k, threads), ranked, k, what);
              }
            }});
}

void factor_threshold_case(const FactorSet& set, const std::string& name, bool large) {
  const std::vector<float> f = set.naive();
  const auto count = static_cast<int64_t>(f.size());
  exercise({"factor_threshold", name + " " + set.name(), large,
            [=, ranked = ranking(f.data(), count)](const std::string& what, int threads) {
              for (const int64_t k : choices_of_k(count)) {
                check_boundary(factor_threshold(set.factors(), k, threads), ranked, k, what);
              }
            }});
}

// The kernels agree with themselves where F is rounded and no naive loop has its last bits.
void rounded_factor_threshold_case(int64_t out, int64_t in) {
  constexpr int64_t kRank = 8, kSteps = 4;
  const FactorSet set = make_factors(DType::float32, out, in, kRank, kSteps, plain, 30);
  std::vector<FactorSet> steps;
  for (int64_t step = 0; step < kSteps; ++step) {
    FactorSet& one = steps.emplace_back(make_factors(DType::float32, out, in, kRank, 1, plain, 0));
    for (int64_t i = 0; i < one.a.count(); ++i) one.a.set(i, set.a.get(step * one.a.count() + i));
    for (int64_t i = 0; i < one.b.count(); ++i) one.b.set(i, set.b.get(step * one.b.count() + i));
  }
  exercise({"factor_threshold", "rounded " + set.name(), true, [=](const std::string& what, int threads) {
              Elements f = copy_of(std::vector<float>(static_cast<size_t>(out * in)), 1);
              for (const FactorSet& step : steps) outer_square_accumulate(f.floats(), step.factors(), threads);
              const std::vector<Entry> ranked = ranking(f.floats(), out * in);
              for (const int64_t k : choices_of_k(out * in)) {
                check_boundary(factor_threshold(set.factors(), k, threads), ranked, k, what);
              }
            }});
}

// Rows are large, with entries as `entry` says, but for the small ones that the sample takes.
FactorSet hidden_rows(int64_t out, int64_t in, Draw entry) {
  FactorSet set = make_factors(DType::float32, out, in, 1, 3, entry, 40);
  const std::vector<bool> hidden = hidden_rows_of(out, in);
  for (int64_t i = 0; i < set.b.count(); ++i) set.b.set(i, hidden[static_cast<size_t>(i % out)] ? 64 : 1.0 / 64);
  return set;
}

void selections() {
  for (const Pattern& pattern : kPatterns) {
    for (const int64_t count : kCounts) {
      for (const int64_t lead : leads(count)) {
        threshold_case(pattern, count, lead);
      }
    }
  }
  for (const int64_t rank : {0, 1, 8, 65}) {
    for (const DType dtype : kDTypes) {
      factor_threshold_case(make_factors(dtype, 7, 13, rank, 2, whole, 21), "", false);
      factor_threshold_case(make_factors(dtype, 97, 257, rank, 2, whole, 22), "", rank >= 65);
      factor_threshold_case(make_factors(dtype, 97, 257, rank, 2, special_factor, 23), "special", rank >= 65);
    }
  }
  factor_threshold_case(make_factors(DType::float32, 5, 3, 8, 0, whole, 24), "no steps", false);
  factor_threshold_case(make_factors(DType::float32, 97, 257, 8, 70, whole, 31), "many steps", true);
  factor_threshold_case(make_factors(DType::bfloat16, 97, 257, 65, 9, whole, 32), "many steps", true);
  factor_threshold_case(make_factors(DType::bfloat16, 20, 30, 513, 3, whole, 33), "a rank of its own panel", false);
  factor_threshold_case(make_factors(DType::bfloat16, 600, 520, 8, 3, whole, 25), "sampled", true);
  factor_threshold_case(make_factors(DType::float32, 1100, 300, 8, 1, whole, 26), "sampled rows", true);
  factor_threshold_case(make_factors(DType::float16, 300, 1100, 8, 1, whole, 27), "sampled columns", true);
  factor_threshold_case(hidden_rows(1100, 520, whole), "hidden rows", true);
  const Draw one = [](Random&) { return 1.0; };
  factor_threshold_case(make_factors(DType::float32, 1100, 520, 1, 3, one, 28), "all equal", true);
  factor_threshold_case(hidden_rows(1100, 520, one), "hidden rows alike", true);
  factor_threshold_case(make_factors(DType::float32, 1, kLarge, 1, 3, whole, 29), "one row", true);
  factor_threshold_case(make_factors(DType::float32, kLarge, 1, 1, 3, whole, 29), "one column", true);
  rounded_factor_threshold_case(193, 513);
  rounded_factor_threshold_case(1100, 300);
}

// ---- importance from factors

void outer_case(const FactorSet& set, const std::string& name, bool large) {
  const std::vector<float> f = set.naive();
  const Elements start = make(DType::float32, set.out * set.in, 1, whole, 50);
  Elements expected = start;
  for (size_t i = 0; i < f.size(); ++i) {
    const auto place = static_cast<int64_t>(i);
    expected.set(place, static_cast<float>(start.get(place)) + f[i]);
  }
  exercise({"outer_square_accumulate", name + " " + set.name(), large, [=](const std::string& what, int threads) {
              Elements igia = start;
              outer_square_accumulate(igia.floats(), set.factors(), threads);
              check_same(igia, expected, true, what);
            }});
}

// One step, as the op has no more.
void outers() {
  const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {7, 13}, {95, 255}, {96, 256}, {97, 257}, {1, 300}, {300, 1}};
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) {
      for (const int64_t rank : {0, 1, 8, 65}) {
        outer_case(make_factors(dtype, out, in, rank, 1, whole, 51), "", false);
      }
    }
    outer_case(make_factors(dtype, 193, 513, 65, 1, whole, 52), "large", true);
    outer_case(make_factors(dtype, 193, 513, 65, 1, special_factor, 53), "special", true);
  }
  outer_case(make_factors(DType::bfloat16, 20, 30, 513, 1, whole, 55), "a rank of its own panel", false);
  outer_case(make_factors(DType::float32, 5, 0, 8, 1, whole, 56), "no columns", false);
  outer_case(make_factors(DType::float32, 0, 5, 8, 1, whole, 57), "no rows", false);
}

}  // namespace
