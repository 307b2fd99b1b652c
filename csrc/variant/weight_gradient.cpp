// Computes one tile of g = dy^T x over all tokens, and uses it while it is still in the cache.
//
// The tokens are packed one chunk at a time: x in panels as wide as the registers hold, dy as wide as the tile. If
// the weight trains, g is rounded to the type of grad and added to it, and what was stored is squared. Otherwise g
// itself is squared. Squares are summed in double. igia gets each square that fits a float, or each absolute
// value. This file may contract multiply and add.
#include <type_traits>

#include "convert.h"
#include "entries.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#elif defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace gradpruner::GRADPRUNER_VARIANT {

namespace {

constexpr int64_t kVectors = GRADPRUNER_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kBlockRows = 6;
constexpr int64_t kDepth = 256;  // packed entries of a column

// A block of registers: kBlockRows x kVectors sums of type `Vector`, from packed entries of type `Packed`. Per
// token, one operand has kGradientRows packed entries and the other one panel.
template <class Wide, class WideVector>
struct Multiply {
  using Packed = Wide;
  using Sum = Wide;
  using Vector = WideVector;
  static constexpr int64_t kTokens = 1;  // in one Packed
  static constexpr int64_t kLanes = sizeof(Vector) / sizeof(Wide);

  static Vector operand(const Packed* x) { return load<Vector>(x); }
  static Vector add(Vector sum, Packed dy, Vector x) { return sum + dy * x; }
  template <class T>
  static Packed pack(const T* first, int64_t, int64_t, int64_t i) {
    return widen(first[i]);
  }
};

#if defined(__AMX_BF16__)
struct MultiplyOnMatrixUnit {
  using Sum = float;
};
using MultiplyBFloat16 = MultiplyOnMatrixUnit;
#elif defined(__AVX512BF16__)
// Two tokens side by side, multiplied exactly and added in float. Denormal entries count as zero.
struct MultiplyPairs {
  using Packed = uint32_t;
  using Sum = float;
  using Vector = FloatVector;
  static constexpr int64_t kTokens = 2;
  static constexpr int64_t kLanes = kFloatLanes;

  static __m512i operand(const Packed* x) { return _mm512_loadu_si512(x); }
  static Vector add(Vector sum, Packed dy, __m512i x) {
    const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(dy)));
    return reinterpret_cast<Vector>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pair, reinterpret_cast<__m512bh>(x)));
  }
  static Packed pack(const BFloat16* first, int64_t stride, int64_t left, int64_t i) {
    return uint32_t{first[i].bits} | (left > 1 ? uint32_t{first[stride + i].bits} << 16 : 0);
  }
};
using MultiplyBFloat16 = MultiplyPairs;
#else
using MultiplyBFloat16 = Multiply<float, FloatVector>;
#endif

// packed[token][i] for `filled` of `width` entries. The rest is zero. data: the chunk's first entry.
template <class Kind, class T>
void pack(const T* data, int64_t tokens, int64_t stride, int64_t filled, int64_t width,
          typename Kind::Packed* __restrict packed) {
  for (int64_t token = 0; token < tokens; token += Kind::kTokens, packed += width) {
    const T* from = data + token * stride;
    const int64_t left = tokens - token;
    if (left >= Kind::kTokens) {  // a case of its own, so that the loop has no condition
      for (int64_t i = 0; i < filled; ++i) packed[i] = Kind::pack(from, stride, Kind::kTokens, i);
    } else {
      for (int64_t i = 0; i < filled; ++i) packed[i] = Kind::pack(from, stride, left, i);
    }
    for (int64_t i = filled; i < width; ++i) packed[i] = 0;
  }
}

template <class Kind>
void multiply_block(const typename Kind::Packed* x, const typename Kind::Packed* dy, int64_t depth,
                    typename Kind::Sum* g) {
  using Vector = typename Kind::Vector;
  Vector sum[kBlockRows][kVectors];
#pragma GCC unroll 6
  for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) sum[i][v] = load<Vector>(g + i * kGradientCols + v * Kind::kLanes);
  }
  for (int64_t k = 0; k < depth; ++k, x += kVectors * Kind::kLanes, dy += kGradientRows) {
    decltype(Kind::operand(x)) from_x[kVectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) from_x[v] = Kind::operand(x + v * Kind::kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) sum[i][v] = Kind::add(sum[i][v], dy[i], from_x[v]);
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) store(g + i * kGradientCols + v * Kind::kLanes, sum[i][v]);
  }
}

// g (kGradientRows, kGradientCols) = the tile; entries past the edge are zero.
template <class Kind, class T>
void multiply(const T* x, const T* dy, const WeightGradient& call, const Tile& tile, char* scratch,
              typename Kind::Sum* g) {
  using Packed = typename Kind::Packed;
  constexpr int64_t kPanel = kVectors * Kind::kLanes;
  auto* packed_dy = reinterpret_cast<Packed*>(scratch);
  Packed* packed_x = packed_dy + kDepth * kGradientRows;
  for (int64_t i = 0; i < kGradientRows * kGradientCols; ++i) g[i] = 0;
  for (int64_t first = 0; first < call.tokens; first += kDepth * Kind::kTokens) {
    const int64_t tokens = smaller(kDepth * Kind::kTokens, call.tokens - first);
    const int64_t depth = (tokens + Kind::kTokens - 1) / Kind::kTokens;
    pack<Kind>(dy + first * call.out + tile.row, tokens, call.out, tile.rows, kGradientRows, packed_dy);
    for (int64_t j = 0; j < tile.cols; j += kPanel) {
      const int64_t cols = smaller(kPanel, tile.cols - j);
      pack<Kind>(x + first * call.in + tile.col + j, tokens, call.in, cols, kPanel, packed_x);
      for (int64_t i = 0; i < tile.rows; i += kBlockRows) {
        multiply_block<Kind>(packed_x, packed_dy + i, depth, g + i * kGradientCols + j);
      }
    }
  }
}

#if defined(__AMX_BF16__)
template <>
void multiply<MultiplyOnMatrixUnit>(const BFloat16* x, const BFloat16* dy, const WeightGradient& call,
                                    const Tile& tile, char* scratch, float* g) {
  amx_product::multiply(x, dy, call, tile, scratch, g);
}
#endif

// values: kGradientCols entries, zero from `count` on. Several vectors of sums are added to in turn, since an addition
// takes several cycles.
template <class V>
double sum_of_squares(const V* values, float* igia, int64_t count) {
  constexpr int64_t kSums = 4;
  DoubleVector sums[kSums] = {};
  for (int64_t i = 0; i < kGradientCols; i += kSums * kDoubleLanes) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < kSums; ++n) {
      const DoubleVector value = load_double(values + i + n * kDoubleLanes);
      sums[n] += value * value;
    }
  }
  if (igia) {
    for (int64_t i = 0; i < count; ++i) {
      const float square = static_cast<float>(values[i] * values[i]);
      igia[i] += bits_of(square) < kInfinity ? square : 0.0f;
    }
  }
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class V>
void add_absolute(const V* values, float* igia, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float size = magnitude(static_cast<float>(values[i]));
    igia[i] += bits_of(size) < kInfinity ? size : 0.0f;
  }
}

// Adds a row of the tile to grad, if there is one, and its squares to igia and to the sum, or its absolute values
// to igia.
template <class Sum>
double finish(const WeightGradient& call, const Sum* g, float* igia, void* grad, int64_t count) {
  if (call.absolute) {
    add_absolute(g, igia, count);
    return 0;
  }
  if (!grad) return sum_of_squares(g, igia, count);
  return with_type(grad, call.grad_dtype, [&](auto* entries) {
    decltype(widen(*entries)) values[kGradientCols] = {};
    for (int64_t i = 0; i < count; ++i) {
      using G = typename std::remove_pointer<decltype(entries)>::type;
      entries[i] = narrow<G>(widen(entries[i]) + widen(narrow<G>(g[i])));
      values[i] = widen(entries[i]);
    }
    return sum_of_squares(values, igia, count);
  });
}

template <class T>
double in_double(const T* x, const T* dy, const WeightGradient& call, int64_t row, int64_t col) {
  double sum = 0;
  for (int64_t token = 0; token < call.tokens; ++token) {
    const double left = widen(dy[token * call.out + row]), right = widen(x[token * call.in + col]);
    sum += left * right;
  }
  return sum;
}

template <class Kind, class T>
double square_tile(const T* x, const T* dy, const WeightGradient& call, const Tile& tile, char* scratch) {
  using Sum = typename Kind::Sum;
  auto* g = reinterpret_cast<Sum*>(scratch);
  multiply<Kind>(x, dy, call, tile, scratch + kGradientRows * kGradientCols * sizeof(Sum), g);
  double total = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t at = (tile.row + i) * call.in + tile.col;
    Sum* row = g + i * kGradientCols;
    float* igia = call.igia ? call.igia + at : nullptr;
    void* grad = call.grad ? static_cast<char*>(call.grad) + at * size_of(call.grad_dtype) : nullptr;
    if (sizeof(Sum) == sizeof(float) && call.finite && !all_finite({row, DType::float32}, tile.cols)) {
      // overflows float, but not double
      double wide[kGradientCols] = {};
      for (int64_t j = 0; j < tile.cols; ++j) wide[j] = in_double(x, dy, call, tile.row + i, tile.col + j);
      total += finish(call, wide, igia, grad, tile.cols);
    } else {
      total += finish(call, row, igia, grad, tile.cols);
    }
  }
  return total;
}

}  // namespace

int64_t weight_gradient_scratch() {
  constexpr int64_t kPanel = kVectors * kFloatLanes;  // entries of a packed row of x; half as many doubles
  constexpr int64_t kEntries = kGradientRows * kGradientCols + kDepth * (kGradientRows + kPanel);
  constexpr int64_t kBytes = kEntries * static_cast<int64_t>(sizeof(double));
#if defined(__AMX_BF16__)
  static_assert(kGradientRows * kGradientCols * sizeof(float) + amx_product::kScratchBytes <= kBytes);
#endif
  return kBytes;
}

double weight_gradient_tile(const WeightGradient& call, const Tile& tile, char* scratch) {
  return with_type({call.x, call.dtype}, [&](auto* x) {
    using T = typename std::remove_pointer<decltype(x)>::type;
    auto* dy = static_cast<const T*>(call.dy);
    if constexpr (std::is_same<T, const BFloat16>::value) {
      return square_tile<MultiplyBFloat16>(x, dy, call, tile, scratch);
    } else if constexpr (sizeof(T) == sizeof(double)) {
      return square_tile<Multiply<double, DoubleVector>>(x, dy, call, tile, scratch);
    } else {
      return square_tile<Multiply<float, FloatVector>>(x, dy, call, tile, scratch);
    }
  });
}

}  // namespace gradpruner::GRADPRUNER_VARIANT
