// Plain data shared by every translation unit. No functions: what is compiled for a newer instruction set must
// not leave behind an inline function that the linker may pick for an older one.
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
  int64_t rows, cols;  // of the matrix that is looked at
  int64_t row_step, col_step;
};

// One donor as a span of the weight sees it.
struct MergeTerm {
  const void* donor;
  const float* importance;
  float value;
  int64_t last;  // the last tie that is kept, counted from the start of the span
  double scale;
};

// A positive float as its bit pattern, which orders as the float does, and its flat index.
struct Candidate {
  int64_t index;
  uint32_t bits;
};

constexpr uint32_t kSmallestPositive = 1;
constexpr uint32_t kInfinity = 0x7F800000;

// The importance tile. Selection and merge rebuild F in this one shape, so each entry has the same bits in both.
constexpr int64_t kTileRows = 96;
constexpr int64_t kTileCols = 256;
constexpr int64_t kTileSize = kTileRows * kTileCols;

}  // namespace gradpruner
