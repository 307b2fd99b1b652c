// What every case of the exercise needs: counted threads, checks, names, hostile values and sets of factors.
#pragma once

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

}  // namespace
