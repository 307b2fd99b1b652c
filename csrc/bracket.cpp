#include "bracket.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <vector>

namespace gradpruner {

namespace {

constexpr double kDeviations = 4;

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

double variance_of_mean(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  double mean = 0;
  for (double value : values) mean += value;
  mean /= static_cast<double>(values.size());
  double squares = 0;
  for (double value : values) squares += (value - mean) * (value - mean);
  return squares / static_cast<double>(values.size() - 1) / static_cast<double>(values.size());
}

// How far the share of entries above `pivot` may be from the sample's. Rows and columns differ from each other in
// a weight (some outputs matter more), so they are what was sampled, not the entries.
double share_error(const Sample& sample, float pivot) {
  std::vector<double> by_row(static_cast<size_t>(sample.rows));
  std::vector<double> by_col(static_cast<size_t>(sample.cols));
  const float* entry = sample.entries.data();
  for (double& row : by_row) {
    for (double& col : by_col) {
      const double above = *entry++ > pivot;
      row += above / static_cast<double>(sample.cols);
      col += above / static_cast<double>(sample.rows);
    }
  }
  return kDeviations * std::sqrt(variance_of_mean(by_row) + variance_of_mean(by_col)) +
         kDeviations / static_cast<double>(sample.entries.size());
}

}  // namespace

Bracket guess_bracket(const Sample& sample, double share_kept) {
  std::vector<float> positive;
  std::copy_if(sample.entries.begin(), sample.entries.end(), std::back_inserter(positive),
               [](float value) { return value > 0; });
  const auto total = static_cast<double>(sample.entries.size());
  const auto ranked = [&](double share) {
    const auto place = positive.begin() + static_cast<int64_t>(share * total);
    std::nth_element(positive.begin(), place, positive.end(), std::greater<>());
    return *place;
  };
  const double positive_share = static_cast<double>(positive.size()) / total;
  const float pivot = share_kept < positive_share ? ranked(share_kept) : 0.0f;
  const double error = share_error(sample, pivot);
  const double fewest = share_kept - error;
  const double most = share_kept + error;
  Bracket bracket;
  if (fewest > 0 && fewest < positive_share) bracket.high = bits_of(ranked(fewest));
  if (most < positive_share) bracket.low = bits_of(ranked(most));
  return bracket;
}

}  // namespace gradpruner
