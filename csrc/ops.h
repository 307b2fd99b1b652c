// The ops, on addresses: what module.cpp gives to Python. `threads` is the most that may run at once.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace gradpruner {

// One pair a (rank, in), b (out, rank).
struct Pair {
  Array a, b;
  int64_t rank, in, out;
};

struct Threshold {
  float value;
  int64_t index;
};

void gram_norm(const std::vector<Pair>& pairs, double* norms, int threads);

void square_accumulate(float* igia, Array grad, int64_t count, int threads);
void outer_square_accumulate(float* igia, const Factors& factors, int threads);

bool all_finite(Array data, int64_t count, int threads);
double weight_gradient(const WeightGradient& call, int threads);

Threshold threshold(const float* igia, int64_t count, int64_t k, int threads);
Threshold factor_threshold(const Factors& factors, int64_t k, int threads);

void weight_importance(const WeightImportance& of, float* found, int threads);
// mask (out, ceil(in / 8)) has one bit per entry. group divides in.
void prune_groups(const WeightImportance& by, int64_t kept, int64_t group, uint8_t* mask, int threads);
void apply_mask(void* weight, DType dtype, int64_t out, int64_t in, const uint8_t* mask, int threads);

struct Donor {
  const void* weight;
  const float* igia;  // the importance; null if the factors stand for it
  Factors factors;
  Threshold threshold;
  double scale;
};

void sign_merge(void* weight, DType dtype, int64_t count, const std::vector<Donor>& donors, int threads);
// The factors of every donor stand for a matrix of the weight's shape.
void factor_sign_merge(void* weight, DType dtype, const std::vector<Donor>& donors, int threads);

int64_t element_size(DType dtype);

}  // namespace gradpruner
