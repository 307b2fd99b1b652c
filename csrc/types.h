// Plain data shared by every translation unit. There are no functions here: a file that is compiled for a newer
// instruction set must not leave an inline function behind that the linker may choose for an older one.
#pragma once

#include <cstdint>

namespace gradpruner {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

struct Array {
  const void* data;
  DType dtype;
};

// The factors a (steps, rank, in) and b (steps, out, rank) of one importance matrix, or of a sample of it that
// takes every row_step-th row and every col_step-th column.
struct Factors {
  const void* a;
  const void* b;
  DType dtype;
  int64_t steps, rank;
  int64_t out, in;     // of the arrays
  int64_t rows, cols;  // of the matrix or the sample
  int64_t row_step, col_step;
};

struct Tile {
  int64_t row, col;    // of its first entry
  int64_t rows, cols;  // that lie inside the matrix
};

// g = dy^T x of x (tokens, in) and dy (tokens, out). igia and grad (out, in) may be null. `finite`: x and dy are
// finite. `absolute`: igia gets abs(g) and not g ** 2, and no sum is wanted.
struct WeightGradient {
  const void* x;
  const void* dy;
  DType dtype;
  int64_t tokens, in, out;
  bool finite;
  float* igia;
  void* grad;
  DType grad_dtype;
  bool absolute;
};

// What the importance of single weights (out, in) is computed from. norms (in) and grads (out, in) may be null.
struct WeightImportance {
  void* weight;
  DType dtype;
  int64_t out, in;
  const float* norms;
  const float* grads;
  float alpha;
};

// One donor as a span of the weight sees it.
struct MergeTerm {
  const void* donor;
  const float* importance;
  float value;
  int64_t last;  // the last tie that is kept, counted from the start of the span
  double scale;
};

// How many entries lie within the bounds, and how many above them.
struct Collected {
  int64_t inside, above;
};

constexpr uint32_t kSmallestPositive = 1;
constexpr uint32_t kInfinity = 0x7F800000;

// The importance tile. Selection and merge rebuild F in this one shape, so each entry has the same bits in both.
constexpr int64_t kTileRows = 96;
constexpr int64_t kTileCols = 256;
constexpr int64_t kTileSize = kTileRows * kTileCols;

// Floats before and after a row that is ranked. They are read, but their values do not matter.
constexpr int64_t kRowMargin = 64;

// The tile of the weight gradient. It is taller, since the columns of x are packed again for every tile.
constexpr int64_t kGradientRows = 192;
constexpr int64_t kGradientCols = 512;

}  // namespace gradpruner
