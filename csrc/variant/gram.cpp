// Gram matrices in double, a chunk of entries at a time: converted once, then every pair of rows multiplied.
#include "entries.h"

#include "convert.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

constexpr int64_t kChunk = 128;
constexpr int64_t kRows = 4;  // kRows * kCols sums fit the registers of every instruction set
constexpr int64_t kCols = 2;

template <class T>
void convert_chunk(const T* data, int64_t rank, int64_t length, int64_t row_stride, int64_t entry_stride,
                   double* chunk) {
  for (int64_t k = 0; k < padded_rank(rank); ++k) {
    double* row = chunk + k * kChunk;
    const int64_t filled = k < rank ? length : 0;
    const T* from = data + k * row_stride;
    if (entry_stride == 1) {
      for (int64_t j = 0; j < filled; ++j) row[j] = widen(from[j]);
    } else {
      for (int64_t j = 0; j < filled; ++j) row[j] = widen(from[j * entry_stride]);
    }
    for (int64_t j = filled; j < kChunk; ++j) row[j] = 0;
  }
}

void multiply_block(const double* left, const double* right, double* gram, int64_t gram_stride) {
  DoubleVector sums[kRows][kCols] = {};
  for (int64_t j = 0; j < kChunk; j += kDoubleLanes) {
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
      const auto factor = load<DoubleVector>(left + row * kChunk + j);
#pragma GCC unroll 2
      for (int64_t col = 0; col < kCols; ++col) {
        sums[row][col] += factor * load<DoubleVector>(right + col * kChunk + j);
      }
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t col = 0; col < kCols; ++col) gram[row * gram_stride + col] += lane_sum(sums[row][col]);
  }
}

}  // namespace

int64_t padded_rank(int64_t rank) { return round_up(rank, kRows); }

int64_t gram_scratch(int64_t rank) { return padded_rank(rank) * kChunk; }

void gram(Array data, int64_t rank, int64_t length, int64_t row_stride, int64_t entry_stride, double* gram,
          double* scratch) {
  const int64_t padded = padded_rank(rank);
  for (int64_t i = 0; i < padded * padded; ++i) gram[i] = 0;
  for (int64_t first = 0; first < length; first += kChunk) {
    with_type(data, [&](auto* entries) {
      convert_chunk(entries + first * entry_stride, rank, smaller(kChunk, length - first), row_stride, entry_stride,
                    scratch);
    });
    for (int64_t i = 0; i < padded; i += kRows) {
      for (int64_t j = 0; j < i + kRows; j += kCols) {
        multiply_block(scratch + i * kChunk, scratch + j * kChunk, gram + i * padded + j, padded);
      }
    }
  }
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
