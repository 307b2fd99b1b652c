// dy^T x of bfloat16 on the matrix unit (AMX), for one tile of the weight gradient.
//
// The unit's registers hold 16 rows of 64 bytes. A multiplication adds, over 32 tokens, a register of dy (16 rows of g,
// 16 pairs of tokens) times one of x (16 pairs of tokens, 16 columns of g) to a register of 16 x 16 sums. Denormal
// entries count as zero, as in the dot products of AVX-512.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace amx_product {

constexpr int64_t kSide = 16;
constexpr int64_t kBlock = 2 * kSide;  // rows and columns of g that are summed at once: all registers are in use
constexpr int64_t kPairs = 256;        // pairs of tokens that are packed at once: a block's columns of x fit the L1

static_assert(kGradientRows % kBlock == 0 && kGradientCols % kBlock == 0 && kPairs % kSide == 0);

// As LDTILECFG reads it. A constant, since the compiler does not know how much of it the intrinsic reads.
struct alignas(64) Layout {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Layout) == 64);
constexpr uint16_t kBytes = kSide * sizeof(uint32_t);
constexpr Layout kLayout = {1, 0, {}, {kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes, kBytes},
                            {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide}};

// The registers of the calling thread. They are released at the end, since other code must not find them configured.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kLayout); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

typedef uint16_t Entries __attribute__((vector_size(32)));
typedef uint32_t Pairs __attribute__((vector_size(64)));

// 16 entries of two tokens, side by side; zero where a mask has no bit.
static inline Pairs side_by_side(const BFloat16* first, const BFloat16* second, __mmask16 in_first,
                                 __mmask16 in_second) {
  const auto low = reinterpret_cast<Entries>(_mm256_maskz_loadu_epi16(in_first, first));
  const auto high = reinterpret_cast<Entries>(_mm256_maskz_loadu_epi16(in_second, second));
  return __builtin_convertvector(low, Pairs) | __builtin_convertvector(high, Pairs) << 16;
}

// to[block of columns][pair][column] = `count` columns of two tokens each, zero past the edges.
static void pack_pairs(const BFloat16* from, int64_t tokens, int64_t stride, int64_t count, int64_t pairs,
                       uint32_t* to) {
  for (int64_t pair = 0; pair < pairs; ++pair, to += kBlock) {
    const BFloat16* first = from + 2 * pair * stride;
    const int64_t left = tokens - 2 * pair;
    const int64_t whole = left >= 2 ? count / kBlock * kBlock : 0;
    uint32_t* block = to;
    for (int64_t i = 0; i < whole; i += kBlock, block += pairs * kBlock) {
      store(block, side_by_side(first + i, first + stride + i, 0xFFFF, 0xFFFF));
      store(block + kSide, side_by_side(first + i + kSide, first + stride + i + kSide, 0xFFFF, 0xFFFF));
    }
    for (int64_t i = whole; i < count; i += kBlock, block += pairs * kBlock) {
      for (int64_t half = 0; half < kBlock; half += kSide) {
        const int64_t inside = smaller(kSide, count - i - half);
        const auto mask = static_cast<__mmask16>(inside > 0 ? (1u << inside) - 1 : 0);
        const BFloat16* entries = left > 0 ? first + i + half : from;
        const BFloat16* next = left > 1 ? first + stride + i + half : from;
        store(block + half, side_by_side(entries, next, left > 0 ? mask : 0, left > 1 ? mask : 0));
      }
    }
  }
}

// to (16, 16) = the transpose of from (16, 16), whose rows are kBlock apart: larger and larger blocks are exchanged.
static void transpose(const uint32_t* from, uint32_t* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i rows[kSide];
#pragma GCC unroll 16
  for (int64_t row = 0; row < kSide; ++row) rows[row] = load<__m512i>(from + row * kBlock);
#pragma GCC unroll 4
  for (int step = 1; step < kSide; step *= 2) {
    const __m512i steps = _mm512_set1_epi32(step);
    const __mmask16 odd = _mm512_test_epi32_mask(lane, steps);
    const __m512i other = _mm512_set1_epi32(kSide);
    const __m512i upper = _mm512_mask_add_epi32(lane, odd, lane, _mm512_sub_epi32(other, steps));
    const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, steps), odd, lane, other);
#pragma GCC unroll 16
    for (int row = 0; row < kSide; ++row) {
      if (row & step) continue;
      const __m512i above = rows[row], below = rows[row + step];
      rows[row] = _mm512_permutex2var_epi32(above, upper, below);
      rows[row + step] = _mm512_permutex2var_epi32(above, lower, below);
    }
  }
#pragma GCC unroll 16
  for (int64_t row = 0; row < kSide; ++row) store(to + row * kSide, rows[row]);
}

// to[block of rows][step][half][row][pair] = `count` columns of dy, zero past the edges. strip: as much as one step
// of all blocks takes.
static void pack_transposed(const BFloat16* from, int64_t tokens, int64_t stride, int64_t count, int64_t pairs,
                            uint32_t* strip, uint32_t* to) {
  for (int64_t pair = 0; pair < pairs; pair += kSide, to += kSide * kBlock) {
    pack_pairs(from + 2 * pair * stride, tokens - 2 * pair, stride, count, kSide, strip);
    for (int64_t i = 0; i < count; i += kBlock) {
      transpose(strip + i * kSide, to + i * pairs);
      transpose(strip + i * kSide + kSide, to + i * pairs + kSide * kSide);
    }
  }
}

// A block of g = dy^T x, or += where this is not the `first` chunk of tokens.
static void multiply_block(const uint32_t* x, const uint32_t* dy, int64_t pairs, bool first, float* g) {
  constexpr int64_t kStride = kGradientCols * sizeof(float);
  float* lower = g + kSide * kGradientCols;
  // The compiler does not know that a load into a tile reads memory, so this makes it store what was packed.
  __asm__ volatile("" ::: "memory");
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, g, kStride);
    _tile_loadd(1, g + kSide, kStride);
    _tile_loadd(2, lower, kStride);
    _tile_loadd(3, lower + kSide, kStride);
  }
  for (int64_t pair = 0; pair < pairs; pair += kSide, x += kSide * kBlock, dy += kSide * kBlock) {
    _tile_loadd(6, x, 2 * kBytes);
    _tile_loadd(4, dy, kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x + kSide, 2 * kBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, dy + kSide * kSide, kBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, g, kStride);
  _tile_stored(1, g + kSide, kStride);
  _tile_stored(2, lower, kStride);
  _tile_stored(3, lower + kSide, kStride);
}

constexpr int64_t kScratchBytes =
    (kPairs * (kGradientRows + kGradientCols) + kSide * kGradientRows) * static_cast<int64_t>(sizeof(uint32_t));

// g (kGradientRows, kGradientCols) = the tile; entries past the edge of its columns are zero, rows past the edge
// undefined. scratch: kScratchBytes.
static void multiply(const BFloat16* x, const BFloat16* dy, const WeightGradient& call, const Tile& tile,
                     char* scratch, float* g) {
  auto* packed_x = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* packed_dy = packed_x + kPairs * kGradientCols;
  uint32_t* strip = packed_dy + kPairs * kGradientRows;
  if (tile.cols < kGradientCols || call.tokens == 0) memset(g, 0, kGradientRows * kGradientCols * sizeof(float));
  const TileRegisters registers;
  for (int64_t token = 0; token < call.tokens; token += 2 * kPairs) {
    const int64_t tokens = smaller(2 * kPairs, call.tokens - token);
    const int64_t pairs = round_up(tokens, 2 * kSide) / 2;
    pack_transposed(dy + token * call.out + tile.row, tokens, call.out, tile.rows, pairs, strip, packed_dy);
    pack_pairs(x + token * call.in + tile.col, tokens, call.in, tile.cols, pairs, packed_x);
    for (int64_t j = 0; j < tile.cols; j += kBlock) {
      for (int64_t i = 0; i < tile.rows; i += kBlock) {
        multiply_block(packed_x + j * pairs, packed_dy + i * pairs, pairs, token == 0, g + i * kGradientCols + j);
      }
    }
  }
}

}  // namespace amx_product

}  // namespace gradpruner::GRADPRUNER_VARIANT
