// Merges, against naive loops.
#pragma once

#include "exercise_selection.h"

namespace {

// ---- merging

constexpr double kScales[] = {1.0, 0.3, 2.0};

template <class Wide>
Elements naive_merge(const Elements& weight, const std::vector<Elements>& donors,
                     const std::vector<std::vector<float>>& importances, const std::vector<Threshold>& thresholds) {
  Elements merged = weight;
  for (int64_t i = 0; i < weight.count(); ++i) {
    const double w = weight.get(i);
    auto sum = static_cast<Wide>(w);
    bool changed = false;
    for (size_t k = 0; k < donors.size(); ++k) {
      const double v = donors[k].get(i);
      const float f = importances[k][static_cast<size_t>(i)];
      const auto [value, index] = thresholds[k];
      const bool kept = f > 0 && (f > value || (f == value && i <= index));
      if (!kept || !((v > 0 && w > 0) || (v < 0 && w < 0))) continue;
      sum += static_cast<Wide>(kScales[k]) * static_cast<Wide>(v);
      changed = true;
    }
    if (changed) merged.set(i, sum);  // else it keeps its bits, a NaN's too
  }
  return merged;
}

struct Merge {
  Elements weight, expected;
  std::vector<Elements> donors;
  std::vector<Threshold> thresholds;
};

Merge make_merge(DType dtype, int64_t count, int64_t lead, const std::vector<std::vector<float>>& importances) {
  const Elements weight = make(dtype, count, lead, special, 60);
  std::vector<Elements> donors;
  std::vector<Threshold> thresholds;
  for (const std::vector<float>& f : importances) {
    const auto seed = static_cast<unsigned>(61 + donors.size());
    // The first donor keeps a fifth, cutting through ties; the second all that it can; the third nothing.
    const int64_t k = donors.empty() ? (count + 4) / 5 : donors.size() == 1 ? count : 0;
    donors.push_back(make(dtype, count, lead, special, seed));
    thresholds.push_back(boundary(ranking(f.data(), count), k));
  }
  Elements expected = dtype == DType::float64 ? naive_merge<double>(weight, donors, importances, thresholds)
                                              : naive_merge<float>(weight, donors, importances, thresholds);
  return {weight, std::move(expected), std::move(donors), std::move(thresholds)};
}

Donor make_donor(const Merge& merge, size_t k) {
  Donor donor{};
  donor.weight = merge.donors[k].data();
  donor.threshold = merge.thresholds[k];
  donor.scale = kScales[k];
  return donor;
}

void sign_merge_case(DType dtype, int64_t count, int64_t lead, size_t donor_count) {
  std::vector<std::vector<float>> importances;
  std::vector<Elements> igias;
  for (size_t k = 0; k < donor_count; ++k) {
    Random random(static_cast<unsigned>(70 + k));
    std::vector<float>& f = importances.emplace_back(static_cast<size_t>(count));
    for (float& entry : f) entry = static_cast<float>(random() % 7 ? random() % 5 : special(random));
    igias.push_back(copy_of(f, lead));
  }
  const std::string name = std::string(name_of(dtype)) + " " + std::to_string(count) + " lead " + std::to_string(lead) +
                           " donors " + std::to_string(donor_count);
  exercise({"sign_merge", name, count == kLarge,
            [=, merge = make_merge(dtype, count, lead, importances)](const std::string& what, int threads) {
              std::vector<Donor> donors;
              for (size_t k = 0; k < donor_count; ++k) {
                donors.push_back(make_donor(merge, k));
                donors.back().igia = igias[k].floats();
              }
              Elements weight = merge.weight;
              sign_merge(weight.data(), dtype, count, donors, threads);
              check_same(weight, merge.expected, false, what);
            }});
}

void factor_sign_merge_case(DType dtype, const std::vector<FactorSet>& sets, int64_t lead, bool large) {
  std::vector<std::vector<float>> importances;
  for (const FactorSet& set : sets) importances.push_back(set.naive());
  const std::string name = std::string(name_of(dtype)) + " lead " + std::to_string(lead) + " donors " +
                           std::to_string(sets.size()) + " " + sets.front().name();
  const int64_t count = sets.front().out * sets.front().in;
  exercise({"factor_sign_merge", name, large,
            [=, merge = make_merge(dtype, count, lead, importances)](const std::string& what, int threads) {
              std::vector<Donor> donors;
              for (size_t k = 0; k < sets.size(); ++k) {
                donors.push_back(make_donor(merge, k));
                donors.back().factors = sets[k].factors();
              }
              Elements weight = merge.weight;
              factor_sign_merge(weight.data(), dtype, donors, threads);
              check_same(weight, merge.expected, false, what);
            }});
}

void merges() {
  for (const DType dtype : kDTypes) {
    for (const int64_t count : kCounts) {
      for (const int64_t lead : leads(count)) {
        if (count != kLarge) sign_merge_case(dtype, count, lead, 1);
        sign_merge_case(dtype, count, lead, 3);
      }
    }
  }
  const std::pair<int64_t, int64_t> shapes[] = {{0, 5}, {5, 0}, {1, 1}, {7, 13}, {95, 255}, {97, 257}, {193, 513}};
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) {
      const FactorSet first = make_factors(DType::float32, out, in, 8, 3, whole, 80);
      factor_sign_merge_case(dtype, {first}, 0, out == 193);
      factor_sign_merge_case(dtype,
                             {first, make_factors(DType::bfloat16, out, in, 65, 1, special_factor, 82),
                              make_factors(DType::float32, out, in, 0, 1, whole, 84)},
                             1, out == 193);
      factor_sign_merge_case(dtype, {make_factors(DType::float32, out, in, 8, 0, whole, 86)}, 1, false);
    }
  }
  factor_sign_merge_case(DType::bfloat16, {make_factors(DType::bfloat16, 600, 520, 1, 70, whole, 88)}, 1, true);
}

}  // namespace
