// What is compiled once per instruction set: loops over plain memory on one thread. No threads, no allocation.
#pragma once

#include "types.h"

namespace gradpruner {

struct Kernels {
  const char* name;

  // gram (padded_rank(rank) squared, lower triangle) = rows @ rows^T in double, where row k has its entry j at
  // data[k * row_stride + j * entry_stride]. scratch: gram_scratch(rank) doubles.
  void (*gram)(Array data, int64_t rank, int64_t length, int64_t row_stride, int64_t entry_stride, double* gram,
               double* scratch);
  int64_t (*padded_rank)(int64_t rank);
  int64_t (*gram_scratch)(int64_t rank);

  // igia += grad ** 2, squared in float.
  void (*square_accumulate)(float* igia, Array grad, int64_t count);
  void (*add)(float* target, const float* source, int64_t count);
  bool (*all_finite)(Array data, int64_t count);

  // The epilogue of the weight gradient, see variant/weight_gradient.cpp. igia and grad may be null.
  double (*square_product)(Array product, float* igia, void* grad, DType grad_dtype, int64_t count);

  // f (kTileRows, kTileCols) = the importance from (row, col) on; entries past the edge are undefined.
  void (*importance_tile)(const Factors& factors, int64_t row, int64_t col, float* f, float* scratch);
  int64_t (*importance_scratch)(int64_t rank);

  // Entries whose bit pattern p has low <= p <= high; both bounds are those of positive floats.
  int64_t (*count_between)(const float* f, int64_t count, uint32_t low, uint32_t high);
  // The same entries, written to `found` (room for `count` of them); returns how many.
  int64_t (*collect)(const float* f, int64_t count, uint32_t low, uint32_t high, int64_t first_index,
                     Candidate* found);
  // ++buckets[(p >> shift) & mask] for the same entries.
  void (*histogram)(const float* f, int64_t count, uint32_t low, uint32_t high, int shift, uint32_t mask,
                    int64_t* buckets);

  // Adds what each donor gives to `count` entries of the weight.
  void (*merge)(void* weight, DType dtype, int64_t count, const MergeTerm* terms, int64_t term_count);
};

// The variant in use: the best this machine has, unless select_variant chose another.
const Kernels& kernels();

// Chooses "portable", "avx2" or "avx512", or the best for "". Returns the name; throws std::invalid_argument.
const char* select_variant(const char* name);

}  // namespace gradpruner
