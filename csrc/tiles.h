// An importance matrix cut into tiles.
#pragma once

#include <algorithm>

#include "types.h"

namespace gradpruner {

struct Tile {
  int64_t row, col;    // of its first entry
  int64_t rows, cols;  // that lie inside the matrix
};

class TileGrid {
 public:
  TileGrid(int64_t rows, int64_t cols)
      : rows_(rows), cols_(cols), tiles_across_((cols + kTileCols - 1) / kTileCols) {}

  // Tiles are numbered row by row.
  int64_t size() const { return (rows_ + kTileRows - 1) / kTileRows * tiles_across_; }
  Tile tile(int64_t number) const {
    const int64_t row = number / tiles_across_ * kTileRows;
    const int64_t col = number % tiles_across_ * kTileCols;
    return {row, col, std::min(kTileRows, rows_ - row), std::min(kTileCols, cols_ - col)};
  }

 private:
  int64_t rows_, cols_, tiles_across_;
};

// Simple operations that rebuilding the matrix takes, some of them done together in a vector.
inline double rebuild_work(const Factors& factors) {
  return static_cast<double>(factors.rows * factors.cols) * static_cast<double>(factors.steps * factors.rank + 1) / 8;
}

}  // namespace gradpruner
