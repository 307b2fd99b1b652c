// Gradients: squares, weight gradients and their norms, against naive loops.
#pragma once

#include "exercise_cases.h"

namespace {

// ---- elementwise

void square_accumulate_case(DType dtype, int64_t count, int64_t lead) {
  const Elements grad = make(dtype, count, lead, special, 1);
  const Elements start = make(DType::float32, count, lead, plain, 2);
  Elements expected = start;
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<float>(grad.get(i));
    expected.set(i, static_cast<float>(start.get(i)) + value * value);
  }
  const std::string name = std::string(name_of(dtype)) + " " + std::to_string(count) + " lead " + std::to_string(lead);
  exercise({"square_accumulate", name, count == kLarge, [=](const std::string& what, int threads) {
              Elements igia = start;
              square_accumulate(igia.floats(), grad.array(), count, threads);
              check_same(igia, expected, true, what);
            }});
}

void all_finite_case(DType dtype, int64_t count, int64_t lead) {
  const std::string name = std::string(name_of(dtype)) + " " + std::to_string(count) + " lead " + std::to_string(lead);
  exercise({"all_finite", name, count == kLarge,
            [=, data = make(dtype, count, lead, plain, 3)](const std::string& what, int threads) {
              check(all_finite(data.array(), count, threads), what + ": all are");
              if (count == 0) return;
              for (const double bad : {kNan, kInf, -kInf}) {
                for (const int64_t place : {int64_t{0}, count / 2, count - 1}) {
                  Elements spoilt = data;
                  spoilt.set(place, bad);
                  check(!all_finite(spoilt.array(), count, threads), what + ": entry " + std::to_string(place));
                }
              }
            }});
}

bool near(double got, double expected) {
  return got == expected || (std::isnan(got) && std::isnan(expected)) ||
         std::fabs(got - expected) <= 1e-12 * std::fabs(expected);
}

struct Product {
  int64_t tokens, in, out;
};

// Finite, but products overflow a float.
double huge(Random& random) { return std::ldexp(whole(random), 100); }

double not_finite(Random& random) {
  static constexpr double kValues[] = {-0.0, kInf, -kInf, kNan};
  return random() % 97 == 0 ? kValues[random() % std::size(kValues)] : whole(random);
}

// `grad_dtype` null: the weight is frozen.
void weight_gradient_case(DType dtype, const DType* grad_dtype, bool with_igia, const Product& shape, Draw draw,
                          const std::string& kind, bool absolute = false) {
  const auto [tokens, in, out] = shape;
  const bool finite = draw != not_finite;
  const Elements x = make(dtype, tokens * in, 1, draw, 4);
  const Elements dy = make(dtype, tokens * out, 1, draw, 5);
  const Elements igia_start = make(DType::float32, with_igia ? out * in : 0, 1, whole, 6);
  const Elements grad_start = make(grad_dtype ? *grad_dtype : DType::float32, grad_dtype ? out * in : 0, 1, whole, 7);
  std::vector<double> product(static_cast<size_t>(out * in)), wide_x(static_cast<size_t>(in));
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t col = 0; col < in; ++col) wide_x[static_cast<size_t>(col)] = x.get(token * in + col);
    for (int64_t row = 0; row < out; ++row) {
      const double left = dy.get(token * out + row);
      const auto sums = product.begin() + row * in;
      for (int64_t col = 0; col < in; ++col) sums[col] += left * wide_x[static_cast<size_t>(col)];
    }
  }
  Elements igia_expected = igia_start, grad_expected = grad_start, rounded = grad_start;
  double sum = 0;
  for (int64_t i = 0; i < out * in; ++i) {
    double value = product[static_cast<size_t>(i)];
    if (grad_dtype) {
      rounded.set(i, value);
      const double both = grad_start.get(i) + rounded.get(i);
      const float in_float = static_cast<float>(grad_start.get(i)) + static_cast<float>(rounded.get(i));
      grad_expected.set(i, *grad_dtype == DType::float64 ? both : in_float);
      value = grad_expected.get(i);
    }
    if (!absolute) sum += value * value;
    const auto added = static_cast<float>(absolute ? std::fabs(value) : value * value);
    if (with_igia && std::isfinite(added)) igia_expected.set(i, static_cast<float>(igia_start.get(i)) + added);
  }
  const std::string into = grad_dtype ? std::string(" into ") + name_of(*grad_dtype) : "";
  const std::string name = kind + " " + name_of(dtype) + into + (with_igia ? " with igia " : " ") +
                           std::to_string(tokens) + " tokens " + std::to_string(out) + "x" + std::to_string(in);
  const bool large = tokens > 0 && out * in > 3 * kGradientRows * kGradientCols;
  exercise({"weight_gradient", name, large, [=, shape = shape](const std::string& what, int threads) {
              Elements igia = igia_start, grad = grad_start;
              WeightGradient call{};
              call.x = x.data();
              call.dy = dy.data();
              call.dtype = x.dtype();
              call.tokens = shape.tokens;
              call.in = shape.in;
              call.out = shape.out;
              call.finite = finite;
              call.igia = igia.floats();
              call.grad = grad.data();
              call.grad_dtype = grad.dtype();
              call.absolute = absolute;
              const double got = weight_gradient(call, threads);
              check(near(got, sum), what + ": sum " + std::to_string(got) + ", expected " + std::to_string(sum));
              check_same(igia, igia_expected, true, what + ": igia");
              check_same(grad, grad_expected, true, what + ": grad");
            }});
}

void weight_gradients() {
  const Product shapes[] = {{0, 7, 5},     {1, 1, 1},     {2, 7, 13},    {7, 13, 7},
                            {255, 65, 31}, {256, 1, 193}, {257, 257, 1}, {513, 33, 67}};
  const Product edges[] = {{3, kGradientCols - 1, kGradientRows - 1}, {3, kGradientCols + 1, kGradientRows + 1}};
  const Product large{17, 2 * kGradientCols + 1, 2 * kGradientRows + 1};
  for (const DType dtype : kDTypes) {
    for (const Product& shape : shapes) {
      weight_gradient_case(dtype, nullptr, true, shape, whole, "whole");
      weight_gradient_case(dtype, nullptr, true, shape, whole, "absolute", true);
      for (const DType& grad_dtype : kDTypes) weight_gradient_case(dtype, &grad_dtype, true, shape, whole, "whole");
    }
    for (const Product& shape : edges) {
      weight_gradient_case(dtype, nullptr, false, shape, whole, "whole");
      weight_gradient_case(dtype, &dtype, true, shape, whole, "whole");
      if (dtype == DType::float16) continue;  // has no room for the huge
      weight_gradient_case(dtype, nullptr, true, shape, huge, "huge");
      for (const DType& grad_dtype : kDTypes) weight_gradient_case(dtype, &grad_dtype, true, shape, huge, "huge");
    }
    for (const DType& grad_dtype : kDTypes) {
      weight_gradient_case(dtype, &grad_dtype, false, edges[1], not_finite, "not finite");
    }
    weight_gradient_case(dtype, nullptr, true, large, whole, "large");
    weight_gradient_case(dtype, nullptr, true, large, whole, "large absolute", true);
    weight_gradient_case(dtype, &dtype, true, large, whole, "large");
  }
}

void elementwise() {
  for (const int64_t count : kCounts) {
    for (const int64_t lead : leads(count)) {
      for (const DType dtype : kDTypes) {
        square_accumulate_case(dtype, count, lead);
      }
    }
  }
  for (const int64_t count : kCounts) {
    for (const int64_t lead : leads(count)) {
      for (const DType dtype : kDTypes) {
        all_finite_case(dtype, count, lead);
      }
    }
  }
}

// ---- gram_norm

struct Shape {
  int64_t rank, in, out;
};

void gram_norm_case(const std::string& name, const std::vector<Shape>& shapes, bool large) {
  std::vector<FactorSet> sets;
  std::vector<double> expected;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const auto [rank, in, out] = shapes[i];
    const auto seed = static_cast<unsigned>(10 + i);
    Elements a = make(kDTypes[i % 4], rank * in, static_cast<int64_t>(i % 2), whole, seed);
    Elements b = make(kDTypes[i / 4 % 4], out * rank, static_cast<int64_t>(i % 3), whole, seed + 1);
    sets.push_back({std::move(a), std::move(b), 1, rank, out, in});
    const std::vector<float> squares = sets.back().naive();
    expected.push_back(std::accumulate(squares.begin(), squares.end(), 0.0));
  }
  // A pair that is not finite must not touch the others.
  sets.push_back(make_factors(DType::float32, 17, 33, 8, 1, special, 7));
  expected.push_back(kNan);
  exercise({"gram_norm", name, large, [=](const std::string& what, int threads) {
              std::vector<Pair> pairs;
              for (const FactorSet& set : sets) {
                Pair pair{};
                pair.a = set.a.array();
                pair.b = set.b.array();
                pair.rank = set.rank;
                pair.in = set.in;
                pair.out = set.out;
                pairs.push_back(pair);
              }
              Elements norms(DType::float64, static_cast<int64_t>(pairs.size()), 1);
              gram_norm(pairs, static_cast<double*>(norms.data()), threads);
              for (size_t i = 0; i < expected.size(); ++i) {
                const double norm = norms.get(static_cast<int64_t>(i));
                check(norm == expected[i] || (std::isnan(norm) && std::isnan(expected[i])),
                      what + ": pair " + std::to_string(i) + " is " + std::to_string(norm) + ", expected " +
                          std::to_string(expected[i]));
              }
            }});
}

void gram_norms() {
  std::vector<Shape> odd;
  for (const int64_t rank : {0, 1, 3, 8, 65}) {
    for (const int64_t in : {1, 7, 127, 128, 129}) odd.push_back({rank, in, 257 - in});
  }
  gram_norm_case("no sizes", {{0, 0, 0}, {8, 0, 5}, {8, 5, 0}, {1, 0, 0}}, false);
  gram_norm_case("odd sizes", odd, true);
  gram_norm_case("large", std::vector<Shape>(8, {65, 300, 257}), true);
}

}  // namespace
