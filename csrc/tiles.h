// An importance matrix cut into tiles.
#pragma once

#include <algorithm>

#include "types.h"

namespace gradpruner {

class TileGrid {
 public:
  TileGrid(int64_t rows, int64_t cols, int64_t tile_rows = kTileRows, int64_t tile_cols = kTileCols)
      : rows_(rows), cols_(cols), tile_rows_(tile_rows), tile_cols_(tile_cols),
        tiles_across_((cols + tile_cols - 1) / tile_cols) {}

  // Tiles are numbered row by row.
  int64_t size() const { return (rows_ + tile_rows_ - 1) / tile_rows_ * tiles_across_; }
  Tile tile(int64_t number) const {
    const int64_t row = number / tiles_across_ * tile_rows_;
    const int64_t col = number % tiles_across_ * tile_cols_;
    return {row, col, std::min(tile_rows_, rows_ - row), std::min(tile_cols_, cols_ - col)};
  }

 private:
  int64_t rows_, cols_, tile_rows_, tile_cols_, tiles_across_;
};

// Simple operations that rebuilding the matrix takes, some of them done together in a vector.
inline double rebuild_work(const Factors& factors) {
  return static_cast<double>(factors.rows * factors.cols) * static_cast<double>(factors.steps * factors.rank + 1) / 8;
}

}  // namespace gradpruner
