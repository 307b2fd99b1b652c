// Where the selection reads importance from: an array, or factors that are rebuilt tile by tile.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "types.h"

namespace gradpruner {

constexpr int64_t kLongestSpan = 1 << 14;

// `f` holds the entries with flat index first, first + 1, ..., kLongestSpan of them at most.
struct Span {
  int worker;
  int64_t first, count;
  const float* f;
};

// Entries spread evenly over the matrix, as rows and columns so that the variation of both can be seen.
struct Sample {
  int64_t rows, cols;
  std::vector<float> entries;
};

class ImportanceSource {
 public:
  virtual ~ImportanceSource() = default;
  virtual int64_t size() const = 0;
  // No span crosses a multiple of this index.
  virtual int64_t grain() const = 0;
  // The most workers that `visit` uses.
  virtual int workers() const = 0;
  virtual Sample sample() const = 0;
  // Calls body for spans that make up [first, end), both multiples of grain() or the size, from several threads.
  // Once `stop` is set the rest may be left out.
  virtual void visit(int64_t first, int64_t end, const std::atomic<bool>& stop,
                     const std::function<void(const Span&)>& body) const = 0;
};

std::unique_ptr<ImportanceSource> array_source(const float* igia, int64_t count, int threads);
std::unique_ptr<ImportanceSource> factor_source(const Factors& factors, int threads);

}  // namespace gradpruner
