#include "bracket.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "float_bits.h"

namespace gradpruner {

namespace {

constexpr double kDeviations = 3;  // a wrong guess costs time, but the result stays exact
constexpr uint32_t kBucket = 1 << 15;  // so many bit patterns, which are 1/256 of a value

double variance_of_mean(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  double mean = 0;
  for (double value : values) mean += value;
  mean /= static_cast<double>(values.size());
  double squares = 0;
  for (double value : values) squares += (value - mean) * (value - mean);
  return squares / static_cast<double>(values.size() - 1) / static_cast<double>(values.size());
}

// How far the share of entries above `pivot` may be from that of the sample. The rows of a weight differ from each
// other, and so do its columns (some outputs matter more). So rows and columns were sampled, not single entries.
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
  // Both variances contain that within rows and columns, which counts once.
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
  // Positive floats by the first bits of their patterns. This is finer than a bracket needs.
  std::vector<int32_t> counts(kInfinity / kBucket + 1);
  int64_t positive = 0;
  for (float entry : sample.entries) {
    const uint32_t bits = bits_of(entry);
    if (bits - kSmallestPositive > kInfinity - kSmallestPositive) continue;
    ++counts[bits / kBucket];
    ++positive;
  }
  const auto total = static_cast<double>(sample.entries.size());
  const double positive_share = static_cast<double>(positive) / total;
  // The bucket of the entry above which this share of the entries lies.
  const auto ranked = [&](double share) {
    auto left = static_cast<int64_t>(share * total);
    auto bucket = static_cast<uint32_t>(counts.size() - 1);
    while (left >= counts[bucket]) left -= counts[bucket--];
    return bucket;
  };
  const float pivot = share_kept < positive_share ? float_of(ranked(share_kept) * kBucket) : 0.0f;
  const double error = share_error(sample, pivot);
  const double fewest = share_kept - error;
  const double most = share_kept + error;
  Bracket bracket;
  if (fewest > 0 && fewest < positive_share) {
    bracket.high = std::min(kInfinity, (ranked(fewest) + 1) * kBucket - 1);
  }
  if (most < positive_share) bracket.low = std::max(kSmallestPositive, ranked(most) * kBucket);
  bracket.share = std::min(1.0, 2 * error);
  return bracket;
}

}  // namespace gradpruner
