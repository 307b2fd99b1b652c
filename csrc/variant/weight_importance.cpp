// The importance of single weights: abs(W) times a factor, every operation rounded to float (docs/method.md,
// section 7).
#include "convert.h"
#include "entries.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

// What is not above zero, a NaN too, becomes zero.
template <bool Norms, bool Grads, class T>
void row_importance(const T* __restrict weight, const float* __restrict norms, const float* __restrict grads,
                    float alpha, int64_t count, float* __restrict found) {
  for (int64_t i = 0; i < count; ++i) {
    float value = magnitude(static_cast<float>(widen(weight[i])));
    if (Grads) {
      const float scaled = alpha * grads[i];
      value *= Norms ? norms[i] + scaled : scaled;
    } else if (Norms) {
      value *= norms[i];
    }
    found[i] = value > 0 ? value : 0.0f;
  }
}

template <class T>
void row_importance(const WeightImportance& of, const T* weight, const float* grads, float* found) {
  if (of.norms && grads) {
    row_importance<true, true>(weight, of.norms, grads, of.alpha, of.in, found);
  } else if (of.norms) {
    row_importance<true, false>(weight, of.norms, grads, of.alpha, of.in, found);
  } else if (grads) {
    row_importance<false, true>(weight, of.norms, grads, of.alpha, of.in, found);
  } else {
    row_importance<false, false>(weight, of.norms, grads, of.alpha, of.in, found);
  }
}

}  // namespace

void weight_importance(const WeightImportance& of, int64_t first, int64_t rows, float* found) {
  with_type({of.weight, of.dtype}, [&](auto* weight) {
    for (int64_t row = first; row < first + rows; ++row, found += of.in) {
      row_importance(of, weight + row * of.in, of.grads ? of.grads + row * of.in : nullptr, found);
    }
  });
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
