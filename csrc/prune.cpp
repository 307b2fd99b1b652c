// Ops on single weights. Rows are spread over threads.
#include <algorithm>

#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace gradpruner {

namespace {

// Chunks of whole rows that have about as many entries.
class RowChunks {
 public:
  RowChunks(int64_t rows, int64_t width) : rows_(rows), width_(width) {
    height_ = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, width));
    count_ = (rows + height_ - 1) / height_;
  }
  int workers(int threads, double work_per_entry) const {
    return worker_count(threads, count_, static_cast<double>(rows_) * static_cast<double>(width_) * work_per_entry);
  }
  // Calls body(worker, first row, rows) for every chunk.
  template <class Body>
  void walk(int workers, const Body& body) const {
    parallel_for(workers, count_, [&](int worker, int64_t chunk) {
      const int64_t first = chunk * height_;
      body(worker, first, std::min(height_, rows_ - first));
    });
  }

 private:
  int64_t rows_, width_, height_, count_;
};

}  // namespace

void weight_importance(const WeightImportance& of, float* found, int threads) {
  const RowChunks chunks(of.out, of.in);
  chunks.walk(chunks.workers(threads, 1), [&](int, int64_t first, int64_t rows) {
    kernels().weight_importance(of, first, rows, found + first * of.in);
  });
}

void prune_groups(const WeightImportance& by, int64_t kept, int64_t group, uint8_t* mask, int threads) {
  const RowChunks chunks(by.out, by.in);
  const int workers = chunks.workers(threads, 8);
  Scratch<float> ranked(workers, 2 * (by.in + 2 * kRowMargin));
  Scratch<uint32_t> found(workers, 2 * (by.in + 1));
  chunks.walk(workers, [&](int worker, int64_t first, int64_t rows) {
    kernels().prune_rows(by, kept, group, first, rows, mask, ranked.of(worker), found.of(worker));
  });
}

void apply_mask(void* weight, DType dtype, int64_t out, int64_t in, const uint8_t* mask, int threads) {
  const RowChunks chunks(out, in);
  const int64_t mask_width = (in + 7) / 8;
  chunks.walk(chunks.workers(threads, 1), [&](int, int64_t first, int64_t rows) {
    for (int64_t row = first; row < first + rows; ++row) {
      kernels().apply_mask(static_cast<char*>(weight) + row * in * element_size(dtype), dtype, in,
                           mask + row * mask_width);
    }
  });
}

}  // namespace gradpruner
