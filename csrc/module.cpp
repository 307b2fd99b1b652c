// The Python module gradpruner._cpu: addresses in, numbers out. Every call releases the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "ops.h"

namespace py = pybind11;
using namespace gradpruner;

namespace {

using Address = uintptr_t;
// The tuples are made in gradpruner/ops/cpp.py, where each field has a name.
//
// Address and element type of a and b, then rank, in, out.
using PairTuple = std::tuple<Address, int, Address, int, int64_t, int64_t, int64_t>;
// Addresses of a (steps, rank, in) and b (steps, out, rank), element type, steps, rank, in, out.
using FactorTuple = std::tuple<Address, Address, int, int64_t, int64_t, int64_t, int64_t>;
// Address of the donor, address or factors of its importance, value and index of the threshold, scale.
using DonorTuple = std::tuple<Address, Address, float, int64_t, double>;
using FactorDonorTuple = std::tuple<Address, FactorTuple, float, int64_t, double>;
// Address and element type of the weight, out, in, addresses of norms and grads (0 for none), alpha.
using WeightTuple = std::tuple<Address, int, int64_t, int64_t, Address, Address, float>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Array array(Address address, int dtype) { return {pointer<const void>(address), static_cast<DType>(dtype)}; }

Factors factors(const FactorTuple& tuple) {
  const auto& [a, b, dtype, steps, rank, in, out] = tuple;
  return {pointer<const void>(a), pointer<const void>(b), static_cast<DType>(dtype), steps, rank, out,
          in, out, in, 1, 1};
}

WeightImportance weight_importance_of(const WeightTuple& tuple) {
  const auto& [weight, dtype, out, in, norms, grads, alpha] = tuple;
  return {pointer<void>(weight), static_cast<DType>(dtype), out, in, pointer<const float>(norms),
          pointer<const float>(grads), alpha};
}

std::tuple<float, int64_t> tuple_of(const Threshold& threshold) { return {threshold.value, threshold.index}; }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Kernels for the CPU. Private: call gradpruner.ops.";
  m.attr("FLOAT32") = static_cast<int>(DType::float32);
  m.attr("BFLOAT16") = static_cast<int>(DType::bfloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::float16);
  m.attr("FLOAT64") = static_cast<int>(DType::float64);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  m.def("select_variant", [](const std::string& name) { return std::string(select_variant(name.c_str())); });

  m.def(
      "gram_norm",
      [](const std::vector<PairTuple>& tuples, Address norms, int threads) {
        std::vector<Pair> pairs;
        for (const auto& [a, a_dtype, b, b_dtype, rank, in, out] : tuples) {
          pairs.push_back({array(a, a_dtype), array(b, b_dtype), rank, in, out});
        }
        gram_norm(pairs, pointer<double>(norms), threads);
      },
      no_gil);
  m.def(
      "square_accumulate",
      [](Address igia, Address grad, int dtype, int64_t count, int threads) {
        square_accumulate(pointer<float>(igia), array(grad, dtype), count, threads);
      },
      no_gil);
  m.def(
      "outer_square_accumulate",
      [](Address igia, const FactorTuple& tuple, int threads) {
        outer_square_accumulate(pointer<float>(igia), factors(tuple), threads);
      },
      no_gil);
  m.def(
      "all_finite",
      [](Address data, int dtype, int64_t count, int threads) {
        return all_finite(array(data, dtype), count, threads);
      },
      no_gil);
  m.def(
      "weight_gradient",
      [](Address x, Address dy, int dtype, int64_t tokens, int64_t in, int64_t out, bool finite, Address igia,
         Address grad, int grad_dtype, bool absolute, int threads) {
        return weight_gradient({pointer<const void>(x), pointer<const void>(dy), static_cast<DType>(dtype), tokens, in,
                                out, finite, pointer<float>(igia), pointer<void>(grad),
                                static_cast<DType>(grad_dtype), absolute},
                               threads);
      },
      no_gil);
  m.def(
      "threshold",
      [](Address igia, int64_t count, int64_t k, int threads) {
        return tuple_of(threshold(pointer<const float>(igia), count, k, threads));
      },
      no_gil);
  m.def(
      "factor_threshold",
      [](const FactorTuple& tuple, int64_t k, int threads) {
        return tuple_of(factor_threshold(factors(tuple), k, threads));
      },
      no_gil);
  m.def(
      "weight_importance",
      [](const WeightTuple& tuple, Address found, int threads) {
        weight_importance(weight_importance_of(tuple), pointer<float>(found), threads);
      },
      no_gil);
  m.def(
      "prune_groups",
      [](const WeightTuple& tuple, int64_t kept, int64_t group, Address mask, int threads) {
        prune_groups(weight_importance_of(tuple), kept, group, pointer<uint8_t>(mask), threads);
      },
      no_gil);
  m.def(
      "apply_mask",
      [](Address weight, int dtype, int64_t out, int64_t in, Address mask, int threads) {
        apply_mask(pointer<void>(weight), static_cast<DType>(dtype), out, in, pointer<const uint8_t>(mask), threads);
      },
      no_gil);
  m.def(
      "sign_merge",
      [](Address weight, int dtype, int64_t count, const std::vector<DonorTuple>& tuples, int threads) {
        std::vector<Donor> donors;
        for (const auto& [donor, igia, value, index, scale] : tuples) {
          donors.push_back({pointer<const void>(donor), pointer<const float>(igia), {}, {value, index}, scale});
        }
        sign_merge(pointer<void>(weight), static_cast<DType>(dtype), count, donors, threads);
      },
      no_gil);
  m.def(
      "factor_sign_merge",
      [](Address weight, int dtype, const std::vector<FactorDonorTuple>& tuples, int threads) {
        std::vector<Donor> donors;
        for (const auto& [donor, tuple, value, index, scale] : tuples) {
          donors.push_back({pointer<const void>(donor), nullptr, factors(tuple), {value, index}, scale});
        }
        factor_sign_merge(pointer<void>(weight), static_cast<DType>(dtype), donors, threads);
      },
      no_gil);
}
