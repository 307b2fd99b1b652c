// Finds which of 64 floats have a bit pattern within bounds. The bits of positive floats, read as integers, order
// as the floats do.
#pragma once

#include "convert.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace gradpruner::GRADPRUNER_VARIANT {

// One bit for each of 64 entries: whether low <= its pattern < low + range.
static inline uint64_t mask_between(const float* f, uint32_t low, uint32_t range) {
  uint64_t mask = 0;
#if defined(__AVX512F__)
  const __m512i from = _mm512_set1_epi32(static_cast<int>(low)), limit = _mm512_set1_epi32(static_cast<int>(range));
  for (int i = 0; i < 64; i += 16) {
    const __m512i distance = _mm512_sub_epi32(_mm512_loadu_si512(f + i), from);
    mask |= uint64_t{_mm512_cmplt_epu32_mask(distance, limit)} << i;
  }
#elif defined(__AVX2__)
  const __m256i from = _mm256_set1_epi32(static_cast<int>(low)), limit = _mm256_set1_epi32(static_cast<int>(range));
  for (int i = 0; i < 64; i += 8) {
    const __m256i distance = _mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(f + i)), from);
    const __m256i outside = _mm256_cmpeq_epi32(_mm256_max_epu32(distance, limit), distance);
    mask |= uint64_t{static_cast<uint8_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(outside)))} << i;
  }
#else
  for (int i = 0; i < 64; ++i) mask |= uint64_t{bits_of(f[i]) - low < range} << i;
#endif
  return mask;
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
