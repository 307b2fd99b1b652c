// The tile registers of AMX in plain C++, so that what feeds them runs under the sanitizers on any processor. For
// the test alone: included before csrc/variant/amx.h, which then finds these in place of the intrinsics.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tiles::load_config
#define _tile_release emulated_tiles::release
#define _tile_zero emulated_tiles::zero
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_dpbf16ps emulated_tiles::multiply

namespace emulated_tiles {

inline thread_local bool configured = false;
inline thread_local uint32_t tiles[8][16][16];

// Palette 1, and eight tiles of 16 rows of 64 bytes.
inline void load_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 64; ++i) {
    const int expected = i == 0 ? 1 : i >= 16 && i < 32 && i % 2 == 0 ? 64 : i >= 48 && i < 56 ? 16 : 0;
    if (bytes[i] != expected || configured) std::abort();
  }
  configured = true;
}
inline void release() { configured = false; }
inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof(tiles[tile])); }
inline void load(int tile, const void* base, int64_t stride) {
  if (!configured) std::abort();
  for (int row = 0; row < 16; ++row) std::memcpy(tiles[tile][row], static_cast<const char*>(base) + row * stride, 64);
}
inline void store(int tile, void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(base) + row * stride, tiles[tile][row], 64);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return (bits & 0x7F800000u) ? value : 0.0f;  // denormals count as zero
}
// The even tokens' products and the odd ones' are summed apart, as the instruction does.
inline void multiply(int to, int left, int right) {
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 16; ++col) {
      float even = 0, odd = 0;
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t a = tiles[left][row][pair], b = tiles[right][pair][col];
        even += from_bits(a << 16) * from_bits(b << 16);
        odd += from_bits(a & 0xFFFF0000u) * from_bits(b & 0xFFFF0000u);
      }
      float sum = from_bits(tiles[to][row][col]) + (even + odd);
      std::memcpy(&tiles[to][row][col], &sum, sizeof(sum));
    }
  }
}

}  // namespace emulated_tiles
