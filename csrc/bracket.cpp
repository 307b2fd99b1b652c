#include "bracket.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <vector>

namespace gradpruner {

namespace {

constexpr double kDeviations = 3;  // a miss costs time, not exactness

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
  // The variance within rows and columns is in both, and counts once.
  double share = 0;
  for (double row : by_row) share += row;
  share /= static_cast<double>(sample.rows);
  const double within = share * (1 - share) / static_cast<double>(sample.entries.size());
  const double variance = variance_of_mean(by_row) + variance_of_mean(by_col) - within;
  return kDeviations * std::sqrt(std::max(variance, within)) +
         kDeviations / static_cast<double>(sample.entries.size());
}

}  // namespace

Bracket guess_bracket(const Sample& sample, double share_kept) {
  std::vector<float> positive;
  std::copy_if(sample.entries.begin(), sample.entries.end(), std::back_inserter(positive),
               [](float value) { return value > 0; });
  const auto total = static_cast<double>(sample.entries.size());
  const double positive_share = static_cast<double>(positive.size()) / total;
  // Each search leaves what is larger before its place and what is smaller after it, so the next need not look at all.
  const auto place = [&](double share) { return positive.begin() + static_cast<int64_t>(share * total); };
  const bool split = share_kept < positive_share;
  const auto middle = split ? place(share_kept) : positive.end();
  if (split) std::nth_element(positive.begin(), middle, positive.end(), std::greater<>());
  const float pivot = split ? *middle : 0.0f;
  const auto ranked = [&](double share) {
    const bool before = place(share) < middle;
    const auto last = before ? middle : positive.end();
    std::nth_element(before ? positive.begin() : middle, place(share), last, std::greater<>());
    return *place(share);
  };
  const double error = share_error(sample, pivot);
  const double fewest = share_kept - error;
  const double most = share_kept + error;
  Bracket bracket;
  if (fewest > 0 && fewest < positive_share) bracket.high = bits_of(ranked(fewest));
  if (most < positive_share) bracket.low = bits_of(ranked(most));
  return bracket;
}

}  // namespace gradpruner
