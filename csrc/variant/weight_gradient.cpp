// The epilogue of the weight gradient: what happens to a panel of dy^T x while it is still in the cache.
//
// Where the weight trains, the product is rounded to grad's type, added into it, and what was stored is squared;
// else the product itself is. Squares are taken and summed in double; igia gets each that fits a float.
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

constexpr int64_t kBlock = 512;

template <class P, class G>
void add_product(G* __restrict grad, const P* __restrict product, double* __restrict values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const G stored = narrow<G>(widen(grad[i]) + widen(narrow<G>(product[i])));
    grad[i] = stored;
    values[i] = widen(stored);
  }
}

double sum_of_squares(double* values, int64_t count) {
  for (int64_t i = count; i < kBlock; ++i) values[i] = 0;
  DoubleVector sum = {};
  for (int64_t i = 0; i < kBlock; i += kDoubleLanes) {
    const auto value = load<DoubleVector>(values + i);
    store(values + i, value * value);
    sum += value * value;
  }
  return lane_sum(sum);
}

void add_finite(float* __restrict igia, const double* __restrict squares, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float square = static_cast<float>(squares[i]);
    igia[i] += bits_of(square) < kInfinity ? square : 0.0f;
  }
}

template <class P>
double square_panel(const P* product, float* igia, void* grad, DType grad_dtype, int64_t count) {
  double values[kBlock];
  double sum = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t length = smaller(kBlock, count - first);
    if (grad) {
      with_type(grad, grad_dtype,
                [&](auto* entries) { add_product(entries + first, product + first, values, length); });
    } else {
      for (int64_t i = 0; i < length; ++i) values[i] = product[first + i];
    }
    sum += sum_of_squares(values, length);
    if (igia) add_finite(igia + first, values, length);
  }
  return sum;
}

}  // namespace

double square_product(Array product, float* igia, void* grad, DType grad_dtype, int64_t count) {
  if (product.dtype == DType::float64) {
    return square_panel(static_cast<const double*>(product.data), igia, grad, grad_dtype, count);
  }
  return square_panel(static_cast<const float*>(product.data), igia, grad, grad_dtype, count);
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
