// Gram matrices in double, a chunk of entries at a time.
//
// If a row is contiguous, vectors run along the entries, and each pair of rows has a vector of partial sums. If the
// values of one entry for all rows are contiguous, vectors run along the rows, and each is multiplied by one value of
// the same entry. Neither order needs a transpose, or a sum over lanes inside the loop. Floats become doubles in
// registers if they fill the vectors. Otherwise the chunk is converted first.
#include "entries.h"

#include "convert.h"

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kRows = 4;
constexpr int64_t kCols = GRADPRUNER_VECTOR_BYTES == 64 ? 4 : 2;  // kRows * kCols sums fit the registers
constexpr int64_t kGroup = 8;  // rows that one vector of an entry is multiplied by

template <class T>
constexpr bool kDirect = false;
template <>
constexpr bool kDirect<float> = true;
template <>
constexpr bool kDirect<double> = true;

template <class T>
void convert_rows(const T* data, int64_t rank, int64_t length, int64_t row_stride, double* chunk) {
  for (int64_t k = 0; k < padded_rank(rank); ++k, chunk += kChunk) {
    const int64_t filled = k < rank ? length : 0;
    for (int64_t j = 0; j < filled; ++j) chunk[j] = widen(data[k * row_stride + j]);
    for (int64_t j = filled; j < kChunk; ++j) chunk[j] = 0;
  }
}

template <class T>
void convert_entries(const T* data, int64_t rank, int64_t length, double* chunk) {
  const int64_t padded = padded_rank(rank);
  for (int64_t j = 0; j < length; ++j, chunk += padded) {
    for (int64_t k = 0; k < rank; ++k) chunk[k] = widen(data[j * rank + k]);
    for (int64_t k = rank; k < padded; ++k) chunk[k] = 0;
  }
}

// Column `col` of the block lies `col + Offset` right of its first row on the diagonal. Entries right of the diagonal
// are not wanted. sums: a vector for each pair of rows, `stride` pairs apart.
template <int64_t Offset, class T>
void multiply_rows(const T* left, const T* right, int64_t row_stride, int64_t count, double* sums, int64_t stride) {
  DoubleVector sum[kRows][kCols];
#pragma GCC unroll 4
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int64_t col = 0; col < kCols; ++col) {
      sum[row][col] = load<DoubleVector>(sums + (row * stride + col) * kDoubleLanes);
    }
  }
  for (int64_t j = 0; j < count; j += kDoubleLanes) {
    DoubleVector from_right[kCols];
#pragma GCC unroll 4
    for (int64_t col = 0; col < kCols; ++col) {
      const T* address = right + col * row_stride + j;
      from_right[col] = load_double(address);
      if (Offset == 0) __builtin_prefetch(address + kChunk);  // the next chunk is loaded while this one is multiplied
    }
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) {
      const DoubleVector from_left = load_double(left + row * row_stride + j);
#pragma GCC unroll 4
      for (int64_t col = 0; col < kCols; ++col) {
        if (col + Offset <= row) sum[row][col] += from_left * from_right[col];
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int64_t col = 0; col < kCols; ++col) {
      store(sums + (row * stride + col) * kDoubleLanes, sum[row][col]);
    }
  }
}

// count: a multiple of kDoubleLanes, kChunk at most.
template <class T>
void multiply_chunk(const T* rows, int64_t row_stride, int64_t count, int64_t padded, double* sums) {
  for (int64_t i = 0; i < padded; i += kRows) {
    for (int64_t j = 0; j < i + kRows; j += kCols) {
      const T* left = rows + i * row_stride;
      const T* right = rows + j * row_stride;
      double* block = sums + (i * padded + j) * kDoubleLanes;
      if (j < i) {
        multiply_rows<-kCols>(left, right, row_stride, count, block, padded);
      } else if (j == i) {
        multiply_rows<0>(left, right, row_stride, count, block, padded);
      } else {
        multiply_rows<kRows - kCols>(left, right, row_stride, count, block, padded);
      }
    }
  }
}

void multiply_entries(const double* chunk, int64_t count, int64_t padded, double* gram) {
  for (int64_t i = 0; i < padded; i += kGroup) {
    for (int64_t j = 0; j < i + kGroup; j += kDoubleLanes) {
      DoubleVector sum[kGroup] = {};
      const double* entry = chunk;
      for (int64_t n = 0; n < count; ++n, entry += padded) {
        const auto along = load<DoubleVector>(entry + j);
#pragma GCC unroll 8
        for (int64_t row = 0; row < kGroup; ++row) sum[row] += entry[i + row] * along;
      }
      for (int64_t row = 0; row < kGroup; ++row) {
        double* target = gram + (i + row) * padded + j;
        store(target, load<DoubleVector>(target) + sum[row]);
      }
    }
  }
}

#if GRADPRUNER_VECTOR_BYTES == 64 && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GRADPRUNER_ROTATES
#endif
#endif

#ifdef GRADPRUNER_ROTATES
// Entries of rank 8 fill a vector. All pairs are products of a vector with itself, rotated by 0 to 4 lanes.
template <class T>
void multiply_eights(const T* data, int64_t length, double* gram) {
  constexpr int64_t kRotations = 5;
  constexpr int64_t kTurns = 4;  // entries in flight, each with its own sums
  DoubleVector sum[kTurns][kRotations] = {};
  const auto add = [&](int64_t turn, const T* entry) {
    const DoubleVector v = load_double(entry);
    sum[turn][0] += v * v;
    sum[turn][1] += v * __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 0);
    sum[turn][2] += v * __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 0, 1);
    sum[turn][3] += v * __builtin_shufflevector(v, v, 3, 4, 5, 6, 7, 0, 1, 2);
    sum[turn][4] += v * __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  };
  int64_t n = 0;
  for (; n + kTurns <= length; n += kTurns) {
    const T* entry = data + n * kGroup;
    __builtin_prefetch(entry + 64 * kGroup);
    __builtin_prefetch(entry + 66 * kGroup);
#pragma GCC unroll 4
    for (int64_t turn = 0; turn < kTurns; ++turn) add(turn, entry + turn * kGroup);
  }
  for (; n < length; ++n) add(0, data + n * kGroup);
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    for (int64_t rotation = 0; rotation < kRotations; ++rotation) {
      // a rotation by half the lanes meets every pair twice
      for (int64_t i = 0; i < (rotation == 4 ? 4 : kGroup); ++i) {
        const int64_t j = (i + rotation) % kGroup;
        gram[(i > j ? i : j) * kGroup + (i > j ? j : i)] += sum[turn][rotation][i];
      }
    }
  }
}
#endif

template <class T>
void add_rows(const T* data, int64_t rank, int64_t length, double* sums, double* chunk) {
  const int64_t padded = padded_rank(rank);
  int64_t first = 0;
  if constexpr (kDirect<T>) {
    const int64_t whole = padded == rank ? length / kDoubleLanes * kDoubleLanes : 0;
    for (; first < whole; first += smaller(kChunk, whole - first)) {
      multiply_chunk(data + first, length, smaller(kChunk, whole - first), padded, sums);
    }
  }
  for (; first < length; first += kChunk) {
    const int64_t count = smaller(kChunk, length - first);
    convert_rows(data + first, rank, count, length, chunk);
    multiply_chunk(chunk, kChunk, round_up(count, kDoubleLanes), padded, sums);
  }
}

template <class T>
void add_entries(const T* data, int64_t rank, int64_t length, double* gram, double* chunk) {
#ifdef GRADPRUNER_ROTATES
  if constexpr (kDirect<T>) {
    if (rank == kGroup) return multiply_eights(data, length, gram);
  }
#endif
  for (int64_t first = 0; first < length; first += kChunk) {
    const int64_t count = smaller(kChunk, length - first);
    convert_entries(data + first * rank, rank, count, chunk);
    multiply_entries(chunk, count, padded_rank(rank), gram);
  }
}

}  // namespace

int64_t padded_rank(int64_t rank) { return round_up(rank, kGroup); }

int64_t gram_scratch(int64_t rank) { return padded_rank(rank) * (kChunk + padded_rank(rank) * kDoubleLanes); }

void gram_of_rows(Array data, int64_t rank, int64_t length, double* gram, double* scratch) {
  const int64_t padded = padded_rank(rank);
  double* sums = scratch + padded * kChunk;
  for (int64_t i = 0; i < padded * padded * kDoubleLanes; ++i) sums[i] = 0;
  with_type(data, [&](auto* entries) { add_rows(entries, rank, length, sums, scratch); });
  for (int64_t i = 0; i < padded * padded; ++i) gram[i] = lane_sum(load<DoubleVector>(sums + i * kDoubleLanes));
}

void gram_of_entries(Array data, int64_t rank, int64_t length, double* gram, double* scratch) {
  for (int64_t i = 0; i < padded_rank(rank) * padded_rank(rank); ++i) gram[i] = 0;
  with_type(data, [&](auto* entries) { add_entries(entries, rank, length, gram, scratch); });
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
