// Every op of ops.h against naive loops, made to be run under sanitizers: every instruction set of this machine, one
// thread and four, sizes around the edges of chunks and tiles, four dtypes, misaligned arrays, hostile values.
//
// Arguments: "all", or "threads" to leave out what runs on one thread, which tells a race detector nothing; then the
// instruction sets. Prints what ran; writes every difference to stderr and exits with 1 if there was one.
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/importance_source.h"
#include "../../csrc/kernels.h"
#include "../../csrc/ops.h"
#include "../../csrc/parallel.h"
#include "elements.h"

using namespace gradpruner;

namespace {

std::atomic<int> threads_started{0};

}  // namespace

// Counts threads, so that a size below which the kernels start none cannot pass for a test of theirs. A sanitizer's
// own pthread_create gives way to the program's, if that can be seen, and stays callable under this name.
extern "C" int __interceptor_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
extern "C" __attribute__((visibility("default"))) int pthread_create(pthread_t* thread,
                                                                     const pthread_attr_t* attributes,
                                                                     void* (*run)(void*), void* argument) {
  ++threads_started;
  return __interceptor_pthread_create(thread, attributes, run, argument);
}

#ifdef EXERCISE_TEAM
// Found where the kernels look for torch's OpenMP runtime. A real one hides how its threads meet from a race detector.
extern "C" __attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*), void* argument,
                                                                     unsigned threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned i = 1; i < threads; ++i) team.emplace_back(body, argument);
  body(argument);
  for (std::thread& thread : team) thread.join();
}
#endif

namespace {

// More than a selection collects at once, not a multiple of anything, and enough to make work for threads.
constexpr int64_t kLarge = 600'001;
constexpr int64_t kCounts[] = {0, 1, 7, 255, 256, 257, (1 << 16) + 1, kLarge};

// Entries between the start of a cache line and an array's. A large array has no room for both in a test's time.
std::vector<int64_t> leads(int64_t count) {
  if (count == kLarge) return {1};
  return {0, 1};
}

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::atomic<int64_t> checks{0};
std::atomic<int64_t> failures{0};
std::string mode;
bool threads_only = false;

void check(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s: %s\n", mode.c_str(), what.c_str());
}

void check_same(const Elements& got, const Elements& expected, bool any_nan, const std::string& what) {
  const int64_t i = got.first_difference(expected, any_nan);
  check(i < 0, i < 0 ? "" : what + ": entry " + std::to_string(i) + " is " + std::to_string(got.get(i)) +
                                ", expected " + std::to_string(expected.get(i)));
}

struct Case {
  std::string op, name;
  bool large;  // four threads start some
  std::function<void(const std::string& what, int threads)> run;
};

std::vector<std::string> variants;  // that this machine can run

// The first large case of each op, for callers that run at once.
std::vector<Case> shared_cases;

void exercise(Case item) {
  if (threads_only && !item.large) return;
  const std::string what = item.op + " " + item.name;
  for (const std::string& variant : variants) {
    select_variant(variant.c_str());
    for (const int threads : {1, 4}) {
      if (threads_only && threads == 1) continue;
      mode = variant + ", " + std::to_string(threads) + " threads";
      const int before = threads_started;
      item.run(what, threads);
      const int started = threads_started - before;
      const bool expected = threads == 1 ? started == 0 : started > 0 || !item.large;
      check(expected, what + ": started " + std::to_string(started) + " threads");
    }
  }
  const bool new_op = shared_cases.empty() || shared_cases.back().op != item.op;
  if (item.large && new_op) shared_cases.push_back(std::move(item));
}

// ---- data

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    default:
      return "float64";
  }
}

using Random = std::mt19937;

double plain(Random& random) { return (static_cast<int>(random() % 4001) - 2000) / 128.0; }

// Small integers, of which every product and sum below is exact in float.
double whole(Random& random) { return static_cast<int>(random() % 7) - 3; }

double special(Random& random) {
  static constexpr double kValues[] = {0.0,      -0.0,     kInf,      -kInf, kNan,    0x1p-149, -0x1p-149, 0x1p-133,
                                       0x1p-24,  -0x1p-25, 1e-5,      65504, -65520., 3.4e38,   -3.4e38,   0x1p-1074,
                                       1e200};
  return random() % 3 == 0 ? kValues[random() % std::size(kValues)] : plain(random);
}

double special_factor(Random& random) {
  static constexpr double kValues[] = {-0.0, kInf, -kInf, kNan, 0x1p-149, -0x1p-133};
  return random() % 97 == 0 ? kValues[random() % std::size(kValues)] : whole(random);
}

using Draw = double (*)(Random&);

Elements make(DType dtype, int64_t count, int64_t lead, Draw draw, unsigned seed) {
  Random random(seed);
  Elements elements(dtype, count, lead);
  for (int64_t i = 0; i < count; ++i) elements.set(i, draw(random));
  return elements;
}

Elements copy_of(const std::vector<float>& values, int64_t lead) {
  Elements elements(DType::float32, static_cast<int64_t>(values.size()), lead);
  for (size_t i = 0; i < values.size(); ++i) elements.set(static_cast<int64_t>(i), values[i]);
  return elements;
}

struct FactorSet {
  Elements a, b;
  int64_t steps, rank, out, in;

  Factors factors() const {
    Factors f{};
    f.a = a.data();
    f.b = b.data();
    f.dtype = a.dtype();
    f.steps = steps;
    f.rank = rank;
    f.out = f.rows = out;
    f.in = f.cols = in;
    f.row_step = f.col_step = 1;
    return f;
  }

  std::string name() const {
    return std::string(name_of(a.dtype())) + " " + std::to_string(out) + "x" + std::to_string(in) + " rank " +
           std::to_string(rank) + " steps " + std::to_string(steps);
  }

  // The importance, float32 (out, in).
  std::vector<float> naive() const {
    std::vector<double> wide_a(static_cast<size_t>(a.count())), wide_b(static_cast<size_t>(b.count()));
    for (size_t i = 0; i < wide_a.size(); ++i) wide_a[i] = a.get(static_cast<int64_t>(i));
    for (size_t i = 0; i < wide_b.size(); ++i) wide_b[i] = b.get(static_cast<int64_t>(i));
    std::vector<double> total(static_cast<size_t>(out * in)), dots(static_cast<size_t>(in));
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t row = 0; row < out; ++row) {
        std::fill(dots.begin(), dots.end(), 0.0);
        for (int64_t k = 0; k < rank; ++k) {
          const double left = wide_b[static_cast<size_t>((step * out + row) * rank + k)];
          const auto right = wide_a.begin() + (step * rank + k) * in;
          for (int64_t col = 0; col < in; ++col) dots[static_cast<size_t>(col)] += left * right[col];
        }
        const auto sums = total.begin() + row * in;
        std::transform(dots.begin(), dots.end(), sums, sums, [](double dot, double sum) { return sum + dot * dot; });
      }
    }
    return {total.begin(), total.end()};
  }
};

FactorSet make_factors(DType dtype, int64_t out, int64_t in, int64_t rank, int64_t steps, Draw draw, unsigned seed) {
  Elements a = make(dtype, steps * rank * in, 1, draw, seed);
  Elements b = make(dtype, steps * out * rank, 1, draw, seed + 1);
  return {std::move(a), std::move(b), steps, rank, out, in};
}

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

// ---- selection

struct Entry {
  float value;
  int64_t index;
};

// The entries that can be kept, the most important first, of equals the one with the lower index.
std::vector<Entry> ranking(const float* f, int64_t count) {
  std::vector<Entry> entries;
  for (int64_t i = 0; i < count; ++i) {
    if (f[i] > 0) entries.push_back({f[i], i});
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& x, const Entry& y) { return x.value > y.value; });
  return entries;
}

Threshold boundary(const std::vector<Entry>& ranked, int64_t k) {
  const auto last = std::min<int64_t>(k, static_cast<int64_t>(ranked.size())) - 1;
  if (last < 0) return {std::numeric_limits<float>::infinity(), -1};
  return {ranked[static_cast<size_t>(last)].value, ranked[static_cast<size_t>(last)].index};
}

void check_boundary(Threshold got, const std::vector<Entry>& ranked, int64_t k, const std::string& what) {
  const Threshold expected = boundary(ranked, k);
  check(got.value == expected.value && got.index == expected.index,
        what + ", k " + std::to_string(k) + ": (" + std::to_string(got.value) + ", " + std::to_string(got.index) +
            "), expected (" + std::to_string(expected.value) + ", " + std::to_string(expected.index) + ")");
}

std::vector<int64_t> choices_of_k(int64_t count) {
  if (count >= kLarge / 2) return {count / 5, count / 2, count};
  std::vector<int64_t> choices{0};
  for (const int64_t k : {int64_t{1}, count / 5, count - 1, count}) {
    if (k > 0 && k <= count) choices.push_back(k);
  }
  return choices;
}

float positive(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Which entries of an array the selection's sample does not see.
std::vector<bool> hidden_from_sample(int64_t count) {
  std::vector<bool> hidden(static_cast<size_t>(count), true);
  if (count < kLarge) return hidden;  // no sample is taken
  std::vector<float> places(static_cast<size_t>(count));
  std::iota(places.begin(), places.end(), 0.0f);
  for (const float place : array_source(places.data(), count, 1)->sample().entries) {
    hidden[static_cast<size_t>(place)] = false;
  }
  return hidden;
}

// Which rows the sample of a matrix of factors does not see: the root of its importance is the row's number.
std::vector<bool> hidden_rows_of(int64_t out, int64_t in) {
  const Draw one = [](Random&) { return 1.0; };
  FactorSet set = make_factors(DType::float32, out, in, 1, 1, one, 0);
  for (int64_t row = 0; row < out; ++row) set.b.set(row, static_cast<double>(row));
  std::vector<bool> hidden(static_cast<size_t>(out), true);
  for (const float f : factor_source(set.factors(), 1)->sample().entries) {
    hidden[static_cast<size_t>(std::sqrt(f))] = false;
  }
  return hidden;
}

struct Pattern {
  const char* name;
  float (*entry)(Random&, bool hidden);
};

const Pattern kPatterns[] = {
    {"all zero", [](Random&, bool) { return 0.0f; }},
    {"all equal", [](Random&, bool) { return 1.5f; }},
    {"all infinite", [](Random&, bool) { return INFINITY; }},
    {"nothing positive", [](Random& random, bool) { return random() % 2 ? NAN : -1.0f; }},
    {"smooth", [](Random& random, bool) { return positive(0x3F800000u + random() % 0x800000u); }},
    {"every scale", [](Random& random, bool) { return positive(random() % 0x7F800001u); }},
    {"subnormal", [](Random& random, bool) { return positive(random() % 0x800000u); }},
    {"ties", [](Random& random, bool) { return static_cast<float>(random() % 5); }},
    {"few positive", [](Random& random, bool) { return random() % 100 == 0 ? 2.5f : 0.0f; }},
    {"special", [](Random& random, bool) { return static_cast<float>(special(random)); }},
    // What the sample does not see, alike in no bit, in 11 bits, in 22 bits, in all: so far the radix has to go.
    {"hidden", [](Random& random, bool hidden) {
       return positive(hidden ? 0x40000000u + random() % 0x3F000000u : random() % 0x3F000000u);
     }},
    {"hidden alike in 11 bits", [](Random& random, bool hidden) {
       return positive(hidden ? 0x60000000u + random() % 0x200000u : random() % 0x3F000000u);
     }},
    {"hidden alike in 22 bits", [](Random& random, bool hidden) {
       return positive(hidden ? 0x60000000u + random() % 0x400u : random() % 0x3F000000u);
     }},
    {"hidden alike", [](Random& random, bool hidden) {
       return positive(hidden ? 0x60000000u : random() % 0x3F000000u);
     }},
};

void threshold_case(const Pattern& pattern, int64_t count, int64_t lead) {
  Random random(20);
  const std::vector<bool> hidden = hidden_from_sample(count);
  Elements igia(DType::float32, count, lead);
  for (int64_t i = 0; i < count; ++i) igia.set(i, pattern.entry(random, hidden[static_cast<size_t>(i)]));
  const std::vector<Entry> ranked = ranking(igia.floats(), count);
  const std::string name = std::string(pattern.name) + " " + std::to_string(count) + " lead " + std::to_string(lead);
  exercise({"threshold", name, count == kLarge, [=](const std::string& what, int threads) {
              for (const int64_t k : choices_of_k(count)) {
                check_boundary(threshold(igia.floats(), count, k, threads), ranked, k, what);
              }
            }});
}

void factor_threshold_case(const FactorSet& set, const std::string& name, bool large) {
  const std::vector<float> f = set.naive();
  const auto count = static_cast<int64_t>(f.size());
  exercise({"factor_threshold", name + " " + set.name(), large,
            [=, ranked = ranking(f.data(), count)](const std::string& what, int threads) {
              for (const int64_t k : choices_of_k(count)) {
                check_boundary(factor_threshold(set.factors(), k, threads), ranked, k, what);
              }
            }});
}

// The kernels agree with themselves where F is rounded and no naive loop has its last bits.
void rounded_factor_threshold_case(int64_t out, int64_t in) {
  constexpr int64_t kRank = 8, kSteps = 4;
  const FactorSet set = make_factors(DType::float32, out, in, kRank, kSteps, plain, 30);
  std::vector<FactorSet> steps;
  for (int64_t step = 0; step < kSteps; ++step) {
    FactorSet& one = steps.emplace_back(make_factors(DType::float32, out, in, kRank, 1, plain, 0));
    for (int64_t i = 0; i < one.a.count(); ++i) one.a.set(i, set.a.get(step * one.a.count() + i));
    for (int64_t i = 0; i < one.b.count(); ++i) one.b.set(i, set.b.get(step * one.b.count() + i));
  }
  exercise({"factor_threshold", "rounded " + set.name(), true, [=](const std::string& what, int threads) {
              Elements f = copy_of(std::vector<float>(static_cast<size_t>(out * in)), 1);
              for (const FactorSet& step : steps) outer_square_accumulate(f.floats(), step.factors(), threads);
              const std::vector<Entry> ranked = ranking(f.floats(), out * in);
              for (const int64_t k : choices_of_k(out * in)) {
                check_boundary(factor_threshold(set.factors(), k, threads), ranked, k, what);
              }
            }});
}

// Rows are large, with entries as `entry` says, but for the small ones that the sample takes.
FactorSet hidden_rows(int64_t out, int64_t in, Draw entry) {
  FactorSet set = make_factors(DType::float32, out, in, 1, 3, entry, 40);
  const std::vector<bool> hidden = hidden_rows_of(out, in);
  for (int64_t i = 0; i < set.b.count(); ++i) set.b.set(i, hidden[static_cast<size_t>(i % out)] ? 64 : 1.0 / 64);
  return set;
}

void selections() {
  for (const Pattern& pattern : kPatterns) {
    for (const int64_t count : kCounts) {
      for (const int64_t lead : leads(count)) {
        threshold_case(pattern, count, lead);
      }
    }
  }
  for (const int64_t rank : {0, 1, 8, 65}) {
    for (const DType dtype : kDTypes) {
      factor_threshold_case(make_factors(dtype, 7, 13, rank, 2, whole, 21), "", false);
      factor_threshold_case(make_factors(dtype, 97, 257, rank, 2, whole, 22), "", rank >= 65);
      factor_threshold_case(make_factors(dtype, 97, 257, rank, 2, special_factor, 23), "special", rank >= 65);
    }
  }
  factor_threshold_case(make_factors(DType::float32, 5, 3, 8, 0, whole, 24), "no steps", false);
  factor_threshold_case(make_factors(DType::float32, 97, 257, 8, 70, whole, 31), "many steps", true);
  factor_threshold_case(make_factors(DType::bfloat16, 97, 257, 65, 9, whole, 32), "many steps", true);
  factor_threshold_case(make_factors(DType::bfloat16, 20, 30, 513, 3, whole, 33), "a rank of its own panel", false);
  factor_threshold_case(make_factors(DType::bfloat16, 600, 520, 8, 3, whole, 25), "sampled", true);
  factor_threshold_case(make_factors(DType::float32, 1100, 300, 8, 1, whole, 26), "sampled rows", true);
  factor_threshold_case(make_factors(DType::float16, 300, 1100, 8, 1, whole, 27), "sampled columns", true);
  factor_threshold_case(hidden_rows(1100, 520, whole), "hidden rows", true);
  const Draw one = [](Random&) { return 1.0; };
  factor_threshold_case(make_factors(DType::float32, 1100, 520, 1, 3, one, 28), "all equal", true);
  factor_threshold_case(hidden_rows(1100, 520, one), "hidden rows alike", true);
  factor_threshold_case(make_factors(DType::float32, 1, kLarge, 1, 3, whole, 29), "one row", true);
  factor_threshold_case(make_factors(DType::float32, kLarge, 1, 1, 3, whole, 29), "one column", true);
  rounded_factor_threshold_case(193, 513);
  rounded_factor_threshold_case(1100, 300);
}

// ---- importance from factors

void outer_case(const FactorSet& set, const std::string& name, bool large) {
  const std::vector<float> f = set.naive();
  const Elements start = make(DType::float32, set.out * set.in, 1, whole, 50);
  Elements expected = start;
  for (size_t i = 0; i < f.size(); ++i) {
    const auto place = static_cast<int64_t>(i);
    expected.set(place, static_cast<float>(start.get(place)) + f[i]);
  }
  exercise({"outer_square_accumulate", name + " " + set.name(), large, [=](const std::string& what, int threads) {
              Elements igia = start;
              outer_square_accumulate(igia.floats(), set.factors(), threads);
              check_same(igia, expected, true, what);
            }});
}

// One step, as the op has no more.
void outers() {
  const std::pair<int64_t, int64_t> shapes[] = {{1, 1}, {7, 13}, {95, 255}, {96, 256}, {97, 257}, {1, 300}, {300, 1}};
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) {
      for (const int64_t rank : {0, 1, 8, 65}) {
        outer_case(make_factors(dtype, out, in, rank, 1, whole, 51), "", false);
      }
    }
    outer_case(make_factors(dtype, 193, 513, 65, 1, whole, 52), "large", true);
    outer_case(make_factors(dtype, 193, 513, 65, 1, special_factor, 53), "special", true);
  }
  outer_case(make_factors(DType::bfloat16, 20, 30, 513, 1, whole, 55), "a rank of its own panel", false);
  outer_case(make_factors(DType::float32, 5, 0, 8, 1, whole, 56), "no columns", false);
  outer_case(make_factors(DType::float32, 0, 5, 8, 1, whole, 57), "no rows", false);
}

// ---- merging

constexpr double kScales[] = {1.0, 0.3, 2.0};

template <class Wide>
Elements naive_merge(const Elements& weight, const std::vector<Elements>& donors,
                     const std::vector<std::vector<float>>& importances, const std::vector<Threshold>& thresholds) {
  Elements merged = weight;
  for (int64_t i = 0; i < weight.count(); ++i) {
    const double w = weight.get(i);
    auto sum = static_cast<Wide>(w);
    bool changed = false;
    for (size_t k = 0; k < donors.size(); ++k) {
      const double v = donors[k].get(i);
      const float f = importances[k][static_cast<size_t>(i)];
      const auto [value, index] = thresholds[k];
      const bool kept = f > 0 && (f > value || (f == value && i <= index));
      if (!kept || !((v > 0 && w > 0) || (v < 0 && w < 0))) continue;
      sum += static_cast<Wide>(kScales[k]) * static_cast<Wide>(v);
      changed = true;
    }
    if (changed) merged.set(i, sum);  // else it keeps its bits, a NaN's too
  }
  return merged;
}

struct Merge {
  Elements weight, expected;
  std::vector<Elements> donors;
  std::vector<Threshold> thresholds;
};

Merge make_merge(DType dtype, int64_t count, int64_t lead, const std::vector<std::vector<float>>& importances) {
  const Elements weight = make(dtype, count, lead, special, 60);
  std::vector<Elements> donors;
  std::vector<Threshold> thresholds;
  for (const std::vector<float>& f : importances) {
    const auto seed = static_cast<unsigned>(61 + donors.size());
    // The first donor keeps a fifth, cutting through ties; the second all that it can; the third nothing.
    const int64_t k = donors.empty() ? (count + 4) / 5 : donors.size() == 1 ? count : 0;
    donors.push_back(make(dtype, count, lead, special, seed));
    thresholds.push_back(boundary(ranking(f.data(), count), k));
  }
  Elements expected = dtype == DType::float64 ? naive_merge<double>(weight, donors, importances, thresholds)
                                              : naive_merge<float>(weight, donors, importances, thresholds);
  return {weight, std::move(expected), std::move(donors), std::move(thresholds)};
}

Donor make_donor(const Merge& merge, size_t k) {
  Donor donor{};
  donor.weight = merge.donors[k].data();
  donor.threshold = merge.thresholds[k];
  donor.scale = kScales[k];
  return donor;
}

void sign_merge_case(DType dtype, int64_t count, int64_t lead, size_t donor_count) {
  std::vector<std::vector<float>> importances;
  std::vector<Elements> igias;
  for (size_t k = 0; k < donor_count; ++k) {
    Random random(static_cast<unsigned>(70 + k));
    std::vector<float>& f = importances.emplace_back(static_cast<size_t>(count));
    for (float& entry : f) entry = static_cast<float>(random() % 7 ? random() % 5 : special(random));
    igias.push_back(copy_of(f, lead));
  }
  const std::string name = std::string(name_of(dtype)) + " " + std::to_string(count) + " lead " + std::to_string(lead) +
                           " donors " + std::to_string(donor_count);
  exercise({"sign_merge", name, count == kLarge,
            [=, merge = make_merge(dtype, count, lead, importances)](const std::string& what, int threads) {
              std::vector<Donor> donors;
              for (size_t k = 0; k < donor_count; ++k) {
                donors.push_back(make_donor(merge, k));
                donors.back().igia = igias[k].floats();
              }
              Elements weight = merge.weight;
              sign_merge(weight.data(), dtype, count, donors, threads);
              check_same(weight, merge.expected, false, what);
            }});
}

void factor_sign_merge_case(DType dtype, const std::vector<FactorSet>& sets, int64_t lead, bool large) {
  std::vector<std::vector<float>> importances;
  for (const FactorSet& set : sets) importances.push_back(set.naive());
  const std::string name = std::string(name_of(dtype)) + " lead " + std::to_string(lead) + " donors " +
                           std::to_string(sets.size()) + " " + sets.front().name();
  const int64_t count = sets.front().out * sets.front().in;
  exercise({"factor_sign_merge", name, large,
            [=, merge = make_merge(dtype, count, lead, importances)](const std::string& what, int threads) {
              std::vector<Donor> donors;
              for (size_t k = 0; k < sets.size(); ++k) {
                donors.push_back(make_donor(merge, k));
                donors.back().factors = sets[k].factors();
              }
              Elements weight = merge.weight;
              factor_sign_merge(weight.data(), dtype, donors, threads);
              check_same(weight, merge.expected, false, what);
            }});
}

void merges() {
  for (const DType dtype : kDTypes) {
    for (const int64_t count : kCounts) {
      for (const int64_t lead : leads(count)) {
        if (count != kLarge) sign_merge_case(dtype, count, lead, 1);
        sign_merge_case(dtype, count, lead, 3);
      }
    }
  }
  const std::pair<int64_t, int64_t> shapes[] = {{0, 5}, {5, 0}, {1, 1}, {7, 13}, {95, 255}, {97, 257}, {193, 513}};
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) {
      const FactorSet first = make_factors(DType::float32, out, in, 8, 3, whole, 80);
      factor_sign_merge_case(dtype, {first}, 0, out == 193);
      factor_sign_merge_case(dtype,
                             {first, make_factors(DType::bfloat16, out, in, 65, 1, special_factor, 82),
                              make_factors(DType::float32, out, in, 0, 1, whole, 84)},
                             1, out == 193);
      factor_sign_merge_case(dtype, {make_factors(DType::float32, out, in, 8, 0, whole, 86)}, 1, false);
    }
  }
  factor_sign_merge_case(DType::bfloat16, {make_factors(DType::bfloat16, 600, 520, 1, 70, whole, 88)}, 1, true);
}

// ---- single weights

// What a weight (out, in) is judged by: neither norms nor grads, norms, grads, both.
struct Judged {
  Elements weight, norms, grads;
  int64_t out, in;
  bool by_norms, by_grads;

  static constexpr float kAlpha = 0.5f;

  WeightImportance of(Elements& written) const {
    WeightImportance call{};
    call.weight = written.data();
    call.dtype = weight.dtype();
    call.out = out;
    call.in = in;
    call.norms = by_norms ? norms.floats() : nullptr;
    call.grads = by_grads ? grads.floats() : nullptr;
    call.alpha = kAlpha;
    return call;
  }

  // Every operation rounded to float; what is not above zero is zero.
  std::vector<float> naive() const {
    std::vector<float> found(static_cast<size_t>(out * in));
    for (int64_t i = 0; i < out * in; ++i) {
      volatile float value = std::fabs(static_cast<float>(weight.get(i)));
      if (by_grads) {
        volatile float factor = kAlpha * static_cast<float>(grads.get(i));
        if (by_norms) factor = static_cast<float>(norms.get(i % in)) + factor;
        value = value * factor;
      } else if (by_norms) {
        value = value * static_cast<float>(norms.get(i % in));
      }
      found[static_cast<size_t>(i)] = value > 0 ? value : 0.0f;
    }
    return found;
  }

  std::string name() const {
    return std::string(name_of(weight.dtype())) + " " + std::to_string(out) + "x" + std::to_string(in) +
           (by_norms ? " norms" : "") + (by_grads ? " grads" : "");
  }
};

Judged judged(DType dtype, int64_t out, int64_t in, int by, Draw draw) {
  return {make(dtype, out * in, 1, draw, 90), make(DType::float32, in, 1, special, 91),
          make(DType::float32, out * in, 1, special, 92), out, in, (by & 1) != 0, (by & 2) != 0};
}

bool is_large(const Judged& item) { return item.out * item.in >= kLarge; }

void weight_importance_case(const Judged& item) {
  exercise({"weight_importance", item.name(), is_large(item),
            [=, expected = copy_of(item.naive(), 1)](const std::string& what, int threads) {
              Elements weight = item.weight, found(DType::float32, item.out * item.in, 1);
              weight_importance(item.of(weight), found.floats(), threads);
              check_same(found, expected, false, what);
            }});
}

// Which entries stay, by ranking every group.
std::vector<bool> kept_of(const std::vector<float>& importance, int64_t kept, int64_t group) {
  std::vector<bool> stays(importance.size());
  std::vector<size_t> places(static_cast<size_t>(group));
  for (size_t start = 0; start < importance.size(); start += places.size()) {
    std::iota(places.begin(), places.end(), start);
    std::stable_sort(places.begin(), places.end(), [&](size_t x, size_t y) { return importance[x] > importance[y]; });
    for (int64_t n = 0; n < kept; ++n) stays[places[static_cast<size_t>(n)]] = true;
  }
  return stays;
}

std::vector<uint8_t> packed(const std::vector<bool>& stays, int64_t out, int64_t in) {
  std::vector<uint8_t> mask(static_cast<size_t>(out * ((in + 7) / 8)));
  for (int64_t i = 0; i < out * in; ++i) {
    const auto byte = static_cast<size_t>(i / in * ((in + 7) / 8) + i % in / 8);
    if (stays[static_cast<size_t>(i)]) mask[byte] = static_cast<uint8_t>(mask[byte] | 1 << i % in % 8);
  }
  return mask;
}

Elements pruned(const Elements& weight, const std::vector<bool>& stays) {
  Elements expected = weight;
  for (int64_t i = 0; i < weight.count(); ++i) {
    if (!stays[static_cast<size_t>(i)]) expected.set(i, 0);
  }
  return expected;
}

void prune_groups_case(const Judged& item, int64_t kept, int64_t group) {
  const std::vector<bool> stays = kept_of(item.naive(), kept, group);
  const std::string name = item.name() + " " + std::to_string(kept) + " of " + std::to_string(group);
  exercise({"prune_groups", name, is_large(item),
            [=, expected = pruned(item.weight, stays), bits = packed(stays, item.out, item.in)](
                const std::string& what, int threads) {
              Elements weight = item.weight;
              std::vector<uint8_t> mask(bits.size(), 0xAA);
              prune_groups(item.of(weight), kept, group, mask.data(), threads);
              check_same(weight, expected, false, what);
              check(mask == bits, what + ": the mask");
            }});
}

void apply_mask_case(const Judged& item) {
  Random random(93);
  std::vector<bool> stays(static_cast<size_t>(item.out * item.in));
  for (size_t i = 0; i < stays.size(); ++i) stays[i] = random() % 3 == 0;
  exercise({"apply_mask", item.name(), is_large(item),
            [=, expected = pruned(item.weight, stays), bits = packed(stays, item.out, item.in)](
                const std::string& what, int threads) {
              Elements weight = item.weight;
              apply_mask(weight.data(), weight.dtype(), item.out, item.in, bits.data(), threads);
              check_same(weight, expected, false, what);
            }});
}

// Groups of every size around those that are ranked in another way, in rows that end inside a byte or with one.
void single_weights() {
  const std::pair<int64_t, int64_t> shapes[] = {{0, 5}, {5, 0}, {1, 1}, {3, 7}, {2, 8}, {3, 65}, {600, 1003}};
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) {
      for (int by = 0; by < 4; ++by) weight_importance_case(judged(dtype, out, in, by, special));
    }
  }
  const std::pair<int64_t, int64_t> groups[] = {{1, 13}, {2, 4},  {3, 3},  {4, 5},  {8, 3},    {17, 2},
                                                {31, 3}, {32, 2}, {33, 2}, {64, 1}, {65, 3}, {1003, 2}};
  for (const DType dtype : kDTypes) {
    for (const auto& [group, count] : groups) {
      for (const int64_t kept : {int64_t{0}, int64_t{1}, group / 2, group}) {
        if (kept > group) continue;
        prune_groups_case(judged(dtype, 3, group * count, 3, special), kept, group);
        prune_groups_case(judged(dtype, 3, group * count, 0, whole), kept, group);
      }
    }
    prune_groups_case(judged(dtype, 600, 1004, 1, plain), 2, 4);
    prune_groups_case(judged(dtype, 600, 1003, 1, plain), 501, 1003);
  }
  for (const DType dtype : kDTypes) {
    for (const auto& [out, in] : shapes) apply_mask_case(judged(dtype, out, in, 0, special));
  }
}

// ---- threads

// What a body throws reaches the caller after every thread has ended, as when memory runs out in one of them.
void exceptions() {
  mode = "parallel_for";
  std::vector<int64_t> seen(1000);
  bool caught = false;
  try {
    parallel_for(4, static_cast<int64_t>(seen.size()), [&](int, int64_t item) {
      seen[static_cast<size_t>(item)] = item;
      if (item == 500) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  check(caught, "the exception was lost");
  check(seen[500] == 500, "an item was lost");
}

// Python calls without its lock: callers share what they read, and nothing that they write.
void callers_at_once() {
  const auto in_order = [](const std::vector<Case>& cases) {
    for (const Case& item : cases) item.run(item.op + " " + item.name, 4);
  };
  const std::vector<Case> backwards(shared_cases.rbegin(), shared_cases.rend());
  for (const std::string& variant : variants) {
    select_variant(variant.c_str());
    mode = variant + ", callers at once";
    for (const std::vector<Case>& second : {shared_cases, backwards}) {
      std::thread first(in_order, std::cref(shared_cases));
      in_order(second);
      first.join();
    }
  }
}

}  // namespace

int main(int argument_count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + argument_count);
  if (words.size() < 2 || (words[0] != "all" && words[0] != "threads")) {
    std::fprintf(stderr, "usage: exercise all|threads INSTRUCTION_SET...\n");
    return 2;
  }
  threads_only = words[0] == "threads";
  for (size_t i = 1; i < words.size(); ++i) {
    try {
      variants.emplace_back(select_variant(words[i].c_str()));
    } catch (const std::invalid_argument& reason) {
      std::printf("%s\n", reason.what());
    }
  }
  const std::pair<const char*, void (*)()> parts[] = {
      {"elementwise", elementwise}, {"weight_gradient", weight_gradients}, {"gram_norm", gram_norms},
      {"selection", selections},    {"outer", outers},                     {"merge", merges},
      {"single weights", single_weights}, {"exceptions", exceptions},   {"callers at once", callers_at_once}};
  for (const auto& [name, run] : parts) {
    const int64_t before = checks;
    run();
    std::printf("%s: %lld checks\n", name, static_cast<long long>(checks - before));
    std::fflush(stdout);
  }
  for (const std::string& variant : variants) std::printf("ran %s\n", variant.c_str());
  for (const Case& item : shared_cases) std::printf("shared %s\n", item.op.c_str());
  std::printf("%lld failures\n", static_cast<long long>(failures.load()));
  return failures == 0 ? 0 : 1;
}
