// Ops on an importance that is given by its factors. It is rebuilt one tile at a time.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "tiles.h"

namespace gradpruner {

namespace {

// One step takes less time than loading the memory that it is added to. So tiles are wide, to walk along rows.
constexpr int64_t kBandRows = 48;
constexpr int64_t kBandCols = 4096;

}  // namespace

void outer_square_accumulate(float* igia, const Factors& factors, int threads) {
  const TileGrid grid(factors.rows, factors.cols, kBandRows, kBandCols);
  const int workers = worker_count(threads, grid.size(), rebuild_work(factors));
  Scratch<float> packed(workers, kernels().importance_scratch(factors.steps, factors.rank, kBandRows, kBandCols));
  parallel_for(workers, grid.size(), [&](int worker, int64_t number) {
    const Tile tile = grid.tile(number);
    float* target = igia + tile.row * factors.cols + tile.col;
    kernels().add_importance(factors, tile, target, factors.cols, packed.of(worker));
  });
}

void factor_sign_merge(void* weight, DType dtype, const std::vector<Donor>& donors, int threads) {
  const Factors& shape = donors.front().factors;
  const TileGrid grid(shape.rows, shape.cols);
  double work = 0;
  int64_t scratch = 0;
  for (const Donor& donor : donors) {
    const Factors& factors = donor.factors;
    work += rebuild_work(factors);
    scratch = std::max(scratch, kernels().importance_scratch(factors.steps, factors.rank, kTileRows, kTileCols));
  }
  const auto count = static_cast<int64_t>(donors.size());
  const int workers = worker_count(threads, grid.size(), work);
  Scratch<float> importance(workers, count * kTileSize);
  Scratch<float> packed(workers, scratch);
  const int64_t bytes = element_size(dtype);
  parallel_for(workers, grid.size(), [&](int worker, int64_t number) {
    const Tile tile = grid.tile(number);
    for (int64_t k = 0; k < count; ++k) {
      kernels().importance_tile(donors[static_cast<size_t>(k)].factors, tile, importance.of(worker) + k * kTileSize,
                                packed.of(worker));
    }
    std::vector<MergeTerm> terms(donors.size());
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t first = (tile.row + i) * shape.cols + tile.col;
      for (size_t k = 0; k < donors.size(); ++k) {
        const Donor& donor = donors[k];
        const float* f = importance.of(worker) + static_cast<int64_t>(k) * kTileSize + i * kTileCols;
        terms[k] = {static_cast<const char*>(donor.weight) + first * bytes, f, donor.threshold.value,
                    donor.threshold.index - first, donor.scale};
      }
      kernels().merge(static_cast<char*>(weight) + first * bytes, dtype, tile.cols, terms.data(), count);
    }
  });
}

}  // namespace gradpruner
