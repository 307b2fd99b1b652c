#include "importance_source.h"

#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "tiles.h"

namespace gradpruner {

namespace {

// Of an array, one entry in so many is sampled. Samples are runs, since a cache line costs the same for one entry
// as for all.
constexpr int64_t kSampleShare = 256;
constexpr int64_t kSampleRun = 64;
// Of a matrix that is rebuilt, about one row and one column in so many are sampled, but at least so many.
constexpr int64_t kSampleStep = 12;
constexpr int64_t kFewestSampled = 128;
constexpr int64_t kMostSampled = 512;

class ArraySource final : public ImportanceSource {
 public:
  ArraySource(const float* igia, int64_t count, int threads)
      : igia_(igia), count_(count), workers_(worker_count(threads, chunks(0, count), static_cast<double>(count))) {}

  int64_t size() const override { return count_; }
  int64_t grain() const override { return kChunk; }
  int workers() const override { return workers_; }

  // Runs of neighbours: many entries cost one cache line.
  Sample sample() const override {
    const int64_t cols = std::min(kSampleRun, count_);
    constexpr int64_t kFewest = kFewestSampled * kFewestSampled, kMost = kMostSampled * kMostSampled;
    const int64_t rows = std::min(count_, std::clamp(count_ / kSampleShare, kFewest, kMost)) / cols;
    Sample sample{rows, cols, {}};
    sample.entries.reserve(static_cast<size_t>(rows * cols));
    for (int64_t row = 0; row < rows; ++row) {
      const float* run = igia_ + count_ / rows * row;
      sample.entries.insert(sample.entries.end(), run, run + cols);
    }
    return sample;
  }

  void visit(int64_t first, int64_t end, const std::atomic<bool>& stop,
             const std::function<void(const Span&)>& body) const override {
    parallel_for(workers_, chunks(first, end), [&](int worker, int64_t chunk) {
      const int64_t start = first + chunk * kChunk;
      if (!stop) body({worker, start, std::min(kChunk, end - start), igia_ + start});
    });
  }

 private:
  static constexpr int64_t kChunk = kLongestSpan;
  static int64_t chunks(int64_t first, int64_t end) { return (end - first + kChunk - 1) / kChunk; }

  const float* igia_;
  int64_t count_;
  int workers_;
};

class FactorSource final : public ImportanceSource {
 public:
  FactorSource(const Factors& factors, int threads)
      : factors_(factors),
        grid_(factors.rows, factors.cols),
        workers_(worker_count(threads, grid_.size(), rebuild_work(factors))) {}

  int64_t size() const override { return factors_.rows * factors_.cols; }
  int64_t grain() const override { return factors_.cols; }
  int workers() const override { return workers_; }

  Sample sample() const override {
    Factors picked = factors_;
    picked.row_step = sample_step(factors_.rows);
    picked.col_step = sample_step(factors_.cols);
    picked.rows = factors_.rows / picked.row_step;
    picked.cols = factors_.cols / picked.col_step;
    Sample sample{picked.rows, picked.cols, {}};
    sample.entries.resize(static_cast<size_t>(picked.rows * picked.cols));
    for_tiles(picked, 0, picked.rows, [&](int, const Tile& tile, const float* f) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        std::copy_n(f + i * kTileCols, tile.cols,
                    sample.entries.begin() + (tile.row + i) * picked.cols + tile.col);
      }
    });
    return sample;
  }

  void visit(int64_t first, int64_t end, const std::atomic<bool>& stop,
             const std::function<void(const Span&)>& body) const override {
    const int64_t first_row = first / factors_.cols;
    const int64_t end_row = end / factors_.cols;
    for_tiles(
        factors_, first_row, end_row,
        [&](int worker, const Tile& tile, const float* f) {
          const int64_t last = std::min(end_row, tile.row + tile.rows);
          for (int64_t row = std::max(first_row, tile.row); row < last; ++row) {
            body({worker, row * factors_.cols + tile.col, tile.cols, f + (row - tile.row) * kTileCols});
          }
        },
        &stop);
  }

 private:
  static int64_t sample_step(int64_t count) {
    return std::max<int64_t>(1, count / std::clamp(count / kSampleStep, kFewestSampled, kMostSampled));
  }

  // Calls body(worker, tile, f) for the tiles of `factors` that hold rows of [first_row, end_row).
  template <class Body>
  void for_tiles(const Factors& factors, int64_t first_row, int64_t end_row, const Body& body,
                 const std::atomic<bool>* stop = nullptr) const {
    const TileGrid grid(factors.rows, factors.cols);
    const int workers = std::min(workers_, worker_count(workers_, grid.size(), rebuild_work(factors)));
    Scratch<float> importance(workers, kTileSize);
    Scratch<float> packed(workers, kernels().importance_scratch(factors.steps, factors.rank, kTileRows, kTileCols));
    parallel_for(workers, grid.size(), [&](int worker, int64_t number) {
      const Tile tile = grid.tile(number);
      if (tile.row + tile.rows <= first_row || tile.row >= end_row || (stop && *stop)) return;
      kernels().importance_tile(factors, tile, importance.of(worker), packed.of(worker));
      body(worker, tile, importance.of(worker));
    });
  }

  Factors factors_;
  TileGrid grid_;
  int workers_;
};

}  // namespace

std::unique_ptr<ImportanceSource> array_source(const float* igia, int64_t count, int threads) {
  return std::make_unique<ArraySource>(igia, count, threads);
}

std::unique_ptr<ImportanceSource> factor_source(const Factors& factors, int threads) {
  return std::make_unique<FactorSource>(factors, threads);
}

}  // namespace gradpruner
