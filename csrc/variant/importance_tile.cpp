// F = sum over steps of (b_i a_i)^2, one tile at a time: the only place where an importance is rebuilt.
//
// The factors of the tile are converted, packed and padded with zeros. Then every entry goes through the same register
// block, in the same order of steps and ranks, also at an edge. So its bits depend on its factors alone. This file may
// contract multiply and add. The result is exact wherever F is exact.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

// The dot products of a step fill the registers. The totals over steps stay in the first-level cache. The
// multiplications of a step hide the time that it takes to load and store them.
constexpr int64_t kVectors = GRADPRUNER_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kBlockRows = 6;
constexpr int64_t kBlockCols = kVectors * kFloatLanes;
static_assert(kTileRows % kBlockRows == 0 && kTileCols % kBlockCols == 0, "blocks must fill the tile");

// So many steps are packed together that the panels stay in the second-level cache.
constexpr int64_t kPackedRank = 256;
// Panels no deeper than this all stay in the first-level cache.
constexpr int64_t kShallow = 64;

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

// Rows as they are, those of one step together: packed[step][row][k], padded to whole blocks.
template <class T>
void pack_b(const T* b, const Factors& factors, int64_t first_step, int64_t steps, int64_t row, int64_t rows,
            float* packed) {
  const int64_t padding = (round_up(rows, kBlockRows) - rows) * factors.rank;
  const int64_t run = factors.row_step == 1 ? rows : 1;  // neighbouring rows are one run
  for (int64_t step = first_step; step < first_step + steps; ++step) {
    for (int64_t i = 0; i < rows; i += run) {
      const T* from = b + (step * factors.out + (row + i) * factors.row_step) * factors.rank;
      for (int64_t j = 0; j < run * factors.rank; ++j) *packed++ = static_cast<float>(widen(from[j]));
    }
    for (int64_t j = 0; j < padding; ++j) *packed++ = 0;
  }
}

// b: its row k lies k * rank further on, its next step b_stride.
void accumulate_block(const float* a, const float* b, int64_t b_stride, int64_t steps, int64_t rank, float* f,
                      int64_t stride) {
  for (int64_t step = 0; step < steps; ++step, b += b_stride) {
    FloatVector dot[kBlockRows][kVectors] = {};
    for (int64_t k = 0; k < rank; ++k, a += kBlockCols) {
      FloatVector from_a[kVectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) from_a[v] = load<FloatVector>(a + v * kFloatLanes);
#pragma GCC unroll 6
      for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) dot[i][v] += b[i * rank + k] * from_a[v];
      }
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        float* total = f + i * stride + v * kFloatLanes;
        store(total, load<FloatVector>(total) + dot[i][v] * dot[i][v]);
      }
    }
  }
}

// The same for a block of which only rows x cols exist.
void accumulate_corner(const float* a, const float* b, int64_t b_stride, int64_t steps, int64_t rank, float* f,
                       int64_t stride, int64_t rows, int64_t cols) {
  float block[kBlockRows * kBlockCols] = {};
  for (int64_t i = 0; i < rows; ++i) memcpy(block + i * kBlockCols, f + i * stride, static_cast<size_t>(cols) * 4);
  accumulate_block(a, b, b_stride, steps, rank, block, kBlockCols);
  for (int64_t i = 0; i < rows; ++i) memcpy(f + i * stride, block + i * kBlockCols, static_cast<size_t>(cols) * 4);
}

}  // namespace

int64_t importance_scratch(int64_t steps, int64_t rank, int64_t rows, int64_t cols) {
  if (rank == 0) return 0;
  return smaller(steps, steps_packed(rank)) * rank * (round_up(rows, kBlockRows) + round_up(cols, kBlockCols));
}

void add_importance(const Factors& factors, const Tile& tile, float* f, int64_t stride, float* scratch) {
  if (factors.rank == 0) return;
  const auto& [row, col, rows, cols] = tile;
  const int64_t chunk = steps_packed(factors.rank);
  for (int64_t first = 0; first < factors.steps; first += chunk) {
    const int64_t steps = smaller(chunk, factors.steps - first);
    const int64_t depth = steps * factors.rank;
    const int64_t b_stride = round_up(rows, kBlockRows) * factors.rank;
    float* packed_a = scratch;
    float* packed_b = scratch + depth * round_up(cols, kBlockCols);
    with_type({factors.a, factors.dtype},
              [&](auto* a) { pack_a(a, factors, first, steps, col, cols, packed_a); });
    with_type({factors.b, factors.dtype},
              [&](auto* b) { pack_b(b, factors, first, steps, row, rows, packed_b); });
    const auto block = [&](int64_t i, int64_t j) {
      const float* a = packed_a + j * depth;
      const float* b = packed_b + i * factors.rank;
      float* target = f + i * stride + j;
      if (i + kBlockRows <= rows && j + kBlockCols <= cols) {
        accumulate_block(a, b, b_stride, steps, factors.rank, target, stride);
      } else {
        accumulate_corner(a, b, b_stride, steps, factors.rank, target, stride, smaller(kBlockRows, rows - i),
                          smaller(kBlockCols, cols - j));
      }
    };
    // A deep panel of a is kept in the cache for all rows; of shallow ones, f is walked along its rows instead.
    if (depth > kShallow) {
      for (int64_t j = 0; j < cols; j += kBlockCols) {
        for (int64_t i = 0; i < rows; i += kBlockRows) block(i, j);
      }
    } else {
      for (int64_t i = 0; i < rows; i += kBlockRows) {
        for (int64_t j = 0; j < cols; j += kBlockCols) block(i, j);
      }
    }
  }
}

void importance_tile(const Factors& factors, const Tile& tile, float* f, float* scratch) {
  for (int64_t i = 0; i < kTileSize; ++i) f[i] = 0;
  add_importance(factors, tile, f, kTileCols, scratch);
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
