// The fused weight gradient. Tiles are spread over threads.
#include <numeric>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "tiles.h"

namespace gradpruner {

double weight_gradient(const WeightGradient& call, int threads) {
  // Tiles go down the columns. Neighbours share the tokens of x, which stay in the cache.
  const TileGrid grid(call.in, call.out, kGradientCols, kGradientRows);
  const double entries = static_cast<double>(call.in) * static_cast<double>(call.out);
  const double work = static_cast<double>(call.tokens + 1) * entries;
  const int workers = worker_count(threads, grid.size(), work / 8);
  Scratch<char> scratch(workers, kernels().weight_gradient_scratch());
  std::vector<double> sums(static_cast<size_t>(grid.size()));
  parallel_for(workers, grid.size(), [&](int worker, int64_t number) {
    const Tile turned = grid.tile(number);
    const Tile tile{turned.col, turned.row, turned.cols, turned.rows};
    sums[static_cast<size_t>(number)] = kernels().weight_gradient_tile(call, tile, scratch.of(worker));
  });
  // Summed in the order of the tiles, so that the sum does not depend on the threads.
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace gradpruner
