// F = sum over steps of (b_i a_i)^2, one tile at a time: the only place where an importance is rebuilt.
//
// The factors of the tile are converted and packed into panels padded with zeros, then every entry goes through
// the same register block, in the same order of steps and ranks, whether it lies at an edge or not: its bits
// depend on its factors alone. This file may contract multiply and add; the result is exact wherever F is exact.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

// A register block holds two sums an entry: the dot product of the step and the total over steps.
constexpr int64_t kVectors = 2;
constexpr int64_t kBlockRows = GRADPRUNER_VECTOR_BYTES == 64 ? 6 : 3;
constexpr int64_t kBlockCols = kVectors * kFloatLanes;
static_assert(kTileRows % kBlockRows == 0 && kTileCols % kBlockCols == 0, "blocks must fill the tile");

// As many steps are packed together as keep the panels in the second-level cache.
constexpr int64_t kPackedRank = 512;

int64_t steps_packed(int64_t rank) { return rank < kPackedRank ? kPackedRank / rank : 1; }

// Panels of kBlockCols columns: panel[step][k][col].
template <class T>
void pack_a(const T* a, const Factors& factors, int64_t first_step, int64_t steps, int64_t col, int64_t cols,
            float* packed) {
  for (int64_t panel = 0; panel < cols; panel += kBlockCols) {
    const int64_t filled = smaller(kBlockCols, cols - panel);
    for (int64_t row = 0; row < steps * factors.rank; ++row, packed += kBlockCols) {
      const T* from = a + (first_step * factors.rank + row) * factors.in + (col + panel) * factors.col_step;
      if (factors.col_step == 1 && filled == kBlockCols) {
        for (int64_t j = 0; j < kBlockCols; ++j) packed[j] = static_cast<float>(widen(from[j]));
        continue;
      }
      for (int64_t j = 0; j < filled; ++j) packed[j] = static_cast<float>(widen(from[j * factors.col_step]));
      for (int64_t j = filled; j < kBlockCols; ++j) packed[j] = 0;
    }
  }
}

// Groups of kBlockRows rows: group[step][k][row].
template <class T>
void pack_b(const T* b, const Factors& factors, int64_t first_step, int64_t steps, int64_t row, int64_t rows,
            float* packed) {
  const int64_t depth = steps * factors.rank;
  for (int64_t group = 0; group < rows; group += kBlockRows, packed += depth * kBlockRows) {
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const bool filled = group + i < rows;
      const int64_t source_row = filled ? (row + group + i) * factors.row_step : 0;
      for (int64_t step = 0; step < steps; ++step) {
        const T* from = b + ((first_step + step) * factors.out + source_row) * factors.rank;
        float* to = packed + step * factors.rank * kBlockRows + i;
        for (int64_t k = 0; k < factors.rank; ++k) {
          to[k * kBlockRows] = filled ? static_cast<float>(widen(from[k])) : 0.0f;
        }
      }
    }
  }
}

void accumulate_block(const float* a, const float* b, int64_t steps, int64_t rank, float* f) {
  FloatVector total[kBlockRows][kVectors];
  for (int64_t i = 0; i < kBlockRows; ++i) {
    for (int64_t v = 0; v < kVectors; ++v) total[i][v] = load<FloatVector>(f + i * kTileCols + v * kFloatLanes);
  }
  for (int64_t step = 0; step < steps; ++step) {
    FloatVector dot[kBlockRows][kVectors] = {};
    for (int64_t k = 0; k < rank; ++k, a += kBlockCols, b += kBlockRows) {
      FloatVector from_a[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) from_a[v] = load<FloatVector>(a + v * kFloatLanes);
#pragma GCC unroll 6
      for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < kVectors; ++v) dot[i][v] += b[i] * from_a[v];
      }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) total[i][v] += dot[i][v] * dot[i][v];
    }
  }
  for (int64_t i = 0; i < kBlockRows; ++i) {
    for (int64_t v = 0; v < kVectors; ++v) store(f + i * kTileCols + v * kFloatLanes, total[i][v]);
  }
}

}  // namespace

int64_t importance_scratch(int64_t rank) {
  return rank == 0 ? 0 : steps_packed(rank) * rank * (kTileRows + kTileCols);
}

void importance_tile(const Factors& factors, int64_t row, int64_t col, float* f, float* scratch) {
  for (int64_t i = 0; i < kTileSize; ++i) f[i] = 0;
  if (factors.rank == 0) return;
  const int64_t rows = smaller(kTileRows, factors.rows - row);
  const int64_t cols = smaller(kTileCols, factors.cols - col);
  const int64_t chunk = steps_packed(factors.rank);
  for (int64_t first = 0; first < factors.steps; first += chunk) {
    const int64_t steps = smaller(chunk, factors.steps - first);
    const int64_t depth = steps * factors.rank;
    float* packed_a = scratch;
    float* packed_b = scratch + depth * kTileCols;
    with_type({factors.a, factors.dtype},
              [&](auto* a) { pack_a(a, factors, first, steps, col, cols, packed_a); });
    with_type({factors.b, factors.dtype},
              [&](auto* b) { pack_b(b, factors, first, steps, row, rows, packed_b); });
    for (int64_t j = 0; j < cols; j += kBlockCols) {
      for (int64_t i = 0; i < rows; i += kBlockRows) {
        accumulate_block(packed_a + j * depth, packed_b + i * depth, steps, factors.rank, f + i * kTileCols + j);
      }
    }
  }
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
