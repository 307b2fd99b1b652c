// The functions behind one variant's `Kernels`; kernels.h says what each does.
#pragma once

#include "variant.h"

namespace gradpruner::GRADPRUNER_VARIANT {

void gram_of_rows(Array data, int64_t rank, int64_t length, double* gram, double* scratch);
void gram_of_entries(Array data, int64_t rank, int64_t length, double* gram, double* scratch);
int64_t padded_rank(int64_t rank);
int64_t gram_scratch(int64_t rank);

void square_accumulate(float* igia, Array grad, int64_t count);
bool all_finite(Array data, int64_t count);

double weight_gradient_tile(const WeightGradient& call, const Tile& tile, char* scratch);
int64_t weight_gradient_scratch();

void add_importance(const Factors& factors, const Tile& tile, float* f, int64_t stride, float* scratch);
void importance_tile(const Factors& factors, const Tile& tile, float* f, float* scratch);
int64_t importance_scratch(int64_t steps, int64_t rank, int64_t rows, int64_t cols);

int64_t count_between(const float* f, int64_t count, uint32_t low, uint32_t high);
Collected collect(const float* f, int64_t count, uint32_t low, uint32_t high, uint32_t* bits, uint32_t* offsets);
void histogram(const float* f, int64_t count, uint32_t low, uint32_t high, int shift, uint32_t mask,
               int64_t* buckets);

void weight_importance(const WeightImportance& of, int64_t first, int64_t rows, float* found);
void prune_rows(const WeightImportance& by, int64_t kept, int64_t group, int64_t first, int64_t rows, uint8_t* mask,
                float* ranked, uint32_t* found);
void apply_mask(void* weight, DType dtype, int64_t count, const uint8_t* mask);

void merge(void* weight, DType dtype, int64_t count, const MergeTerm* terms, int64_t term_count);

}  // namespace gradpruner::GRADPRUNER_VARIANT
