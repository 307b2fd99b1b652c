// The functions behind one variant's `Kernels`; kernels.h says what each does.
#pragma once

#include "variant.h"

namespace gradpruner::GRADPRUNER_VARIANT {

void gram(Array data, int64_t rank, int64_t length, int64_t row_stride, int64_t entry_stride, double* gram,
          double* scratch);
int64_t padded_rank(int64_t rank);
int64_t gram_scratch(int64_t rank);

void square_accumulate(float* igia, Array grad, int64_t count);
void add(float* target, const float* source, int64_t count);
bool all_finite(Array data, int64_t count);

double square_product(Array product, float* igia, void* grad, DType grad_dtype, int64_t count);

void importance_tile(const Factors& factors, int64_t row, int64_t col, float* f, float* scratch);
int64_t importance_scratch(int64_t rank);

int64_t count_between(const float* f, int64_t count, uint32_t low, uint32_t high);
int64_t collect(const float* f, int64_t count, uint32_t low, uint32_t high, int64_t first_index, Candidate* found);
void histogram(const float* f, int64_t count, uint32_t low, uint32_t high, int shift, uint32_t mask,
               int64_t* buckets);

void merge(void* weight, DType dtype, int64_t count, const MergeTerm* terms, int64_t term_count);

}  // namespace gradpruner::GRADPRUNER_VARIANT
