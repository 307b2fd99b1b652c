// What is compiled once per instruction set: loops over plain memory on one thread. No threads, no allocation.
#pragma once

#include "types.h"

namespace gradpruner {

struct Kernels {
  const char* name;

  // gram (padded_rank(rank) squared, lower triangle) = rows @ rows^T in double, of data (rank, length).
  // scratch: gram_scratch(rank) doubles.
  void (*gram_of_rows)(Array data, int64_t rank, int64_t length, double* gram, double* scratch);
  // The same of data (length, rank).
  void (*gram_of_entries)(Array data, int64_t rank, int64_t length, double* gram, double* scratch);
  int64_t (*padded_rank)(int64_t rank);
  int64_t (*gram_scratch)(int64_t rank);

  // igia += grad ** 2. It is squared in float.
  void (*square_accumulate)(float* igia, Array grad, int64_t count);
  bool (*all_finite)(Array data, int64_t count);

  // Adds one tile of the weight gradient, at most kGradientRows x kGradientCols, to grad and igia. Returns the sum of
  // squares, or 0 if it is not wanted. scratch: weight_gradient_scratch() bytes.
  double (*weight_gradient_tile)(const WeightGradient& call, const Tile& tile, char* scratch);
  int64_t (*weight_gradient_scratch)();

  // Adds the importance of a tile of any shape to f, whose rows are `stride` apart. scratch: importance_scratch(steps,
  // rank, rows, cols) floats.
  void (*add_importance)(const Factors& factors, const Tile& tile, float* f, int64_t stride, float* scratch);
  // f (kTileRows, kTileCols) = the importance of a tile of that shape, or of a smaller one at an edge.
  void (*importance_tile)(const Factors& factors, const Tile& tile, float* f, float* scratch);
  int64_t (*importance_scratch)(int64_t steps, int64_t rank, int64_t rows, int64_t cols);

  // Entries whose bit pattern p has low <= p <= high; both bounds are those of positive floats.
  int64_t (*count_between)(const float* f, int64_t count, uint32_t low, uint32_t high);
  // Writes the patterns of the same entries, and their offsets from f, to arrays with room for count + 1. Also counts
  // the entries above `high`. count is below 2^32.
  Collected (*collect)(const float* f, int64_t count, uint32_t low, uint32_t high, uint32_t* bits, uint32_t* offsets);
  // ++buckets[(p >> shift) & mask] for the same entries.
  void (*histogram)(const float* f, int64_t count, uint32_t low, uint32_t high, int shift, uint32_t mask,
                    int64_t* buckets);

  // found (rows, in) = the importance of `rows` rows from row `first` on.
  void (*weight_importance)(const WeightImportance& of, int64_t first, int64_t rows, float* found);
  // Zeroes all but the `kept` most important of each `group` in those rows, and writes their mask. ranked: 2 rows of
  // `in` floats, each with its margins. found: 2 rows of in + 1 numbers.
  void (*prune_rows)(const WeightImportance& by, int64_t kept, int64_t group, int64_t first, int64_t rows,
                     uint8_t* mask, float* ranked, uint32_t* found);
  // Zeroes those of `count` entries whose bit in the mask is not set.
  void (*apply_mask)(void* weight, DType dtype, int64_t count, const uint8_t* mask);

  // Merges all donors into `count` entries of the weight.
  void (*merge)(void* weight, DType dtype, int64_t count, const MergeTerm* terms, int64_t term_count);
};

// The variant in use: the best this machine has, unless select_variant chose another.
const Kernels& kernels();

// Chooses "portable", "avx2", "avx512", "avx512bf16" or "amx", or the best for "". Returns the name; throws
// std::invalid_argument.
const char* select_variant(const char* name);

}  // namespace gradpruner
