// Products of float matrices with rows at arbitrary addresses: tokens are neither gathered before nor scattered after.
//
// The usual method: blocks of b that fit the nearest caches are packed into panels as wide as a few vectors, and a tile
// of c stays in registers while it is summed. AVX2 and AVX-512 sum in the same order; other processors use PyTorch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// One library serves several processors; it asks for the one at hand when it is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_SEVERAL_PROCESSORS
#endif
#define INLINE inline __attribute__((always_inline))

namespace product {

// Element (i, j) is data[row * row_stride + j * column_stride] with row = rows ? rows[i] : i.
template <typename scalar_t>
struct Matrix {
  scalar_t* data;
  const int64_t* rows;
  int64_t row_stride, column_stride;

  INLINE scalar_t* row(int64_t i) const { return data + (rows ? rows[i] : i) * row_stride; }
};

// Computes c = a b, or c += a b. The columns of c are contiguous, and one stride of b is 1.
struct Product {
  Matrix<float> c;
  Matrix<const float> a, b;
  int64_t rows, columns, depth;  // of c, of c, of the sums
  bool add;
};

constexpr int64_t kLine = 16;  // floats per cache line

// Holds W floats.
template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(W * sizeof(float))));
};

template <int W>
INLINE typename Vector<W>::type loaded(const float* from) {
  typename Vector<W>::type vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

#ifdef FOR_SEVERAL_PROCESSORS
constexpr int64_t kDepth = 256;    // rows of b in a block
constexpr int64_t kBlock = 24576;  // floats in a block: 96 KiB
constexpr int64_t kAhead = 8;      // rows that are prefetched

// Computes ROWS rows of VECTORS * W columns of c = a b, or c += a b, and writes the given number of columns.
template <int W, int ROWS, int VECTORS>
INLINE void tile(float* const* c, const float* const* a, int64_t a_stride, const float* b, int64_t depth,
                 int64_t columns, bool add) {
  typename Vector<W>::type sums[ROWS][VECTORS];
  for (auto& row : sums) {  // one by one, to stay in registers: an initializer would fill memory
    for (auto& sum : row) sum = typename Vector<W>::type{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename Vector<W>::type row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = loaded<W>(b + (k * VECTORS + v) * W);
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += a[r][k * a_stride] * row[v];
    }
  }
  if (columns == VECTORS * W) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) {
        if (add) sums[r][v] += loaded<W>(c[r] + v * W);
        std::memcpy(c[r] + v * W, &sums[r][v], sizeof(sums[r][v]));
      }
    }
  } else {
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t j = 0; j < columns; ++j) c[r][j] = sums[r][j / W][j % W] + (add ? c[r][j] : 0);
    }
  }
}

// Transposes 8 by 8 floats.
INLINE void transpose_8(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  Vector<8>::type x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = loaded<8>(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i : {0, 1, 4, 5}) {
    x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &y[i], sizeof(y[i]));
}

// Transposes rows by columns floats.
INLINE void transpose_by_8(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                           int64_t columns) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    for (int64_t r = i + 8; r < std::min(i + 16, rows); ++r) {
      for (int64_t j = 0; j < columns; j += kLine) __builtin_prefetch(from + r * from_stride + j);
    }
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      transpose_8(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
    }
    for (; j < columns; ++j) {
      for (int64_t r = i; r < i + 8; ++r) to[j * to_stride + r] = from[r * from_stride + j];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// Returns the number of vectors in a panel, three or two, that leaves the fewest columns empty.
template <int W>
INLINE int vectors(const Product& p, int64_t j) {
  const int64_t left = (p.columns - j + W - 1) / W;
  return left == 1 || left == 2 || left == 4 ? 2 : 3;
}

// Packs rows from k0 and columns begin to end of b, whose rows may be far apart, into panels [depth, width] with zeros.
template <int W>
INLINE void pack(float* packed, const Product& p, int64_t k0, int64_t depth, int64_t begin, int64_t end) {
  const Matrix<const float>& b = p.b;
  const int64_t last = std::min(end, p.columns);
  if (b.column_stride != 1) {
    for (int64_t j = begin; j < end; j += vectors<W>(p, j) * W) {
      const int64_t width = vectors<W>(p, j) * W, columns = std::min(width, last - j);
      float* to = packed + (j - begin) * depth;
      if (columns < width) std::fill_n(to, depth * width, 0.0f);
      transpose_by_8(to, width, b.data + j * b.column_stride + k0, b.column_stride, columns, depth);
    }
    return;
  }
  int64_t threes = begin;  // end of the full panels of three vectors
  while (threes + 3 * W <= last && vectors<W>(p, threes) == 3) threes += 3 * W;
  for (int64_t k = 0; k < depth; ++k) {
    const float *row = b.row(k0 + k), *next = b.row(k0 + std::min(k + kAhead, depth - 1));
    for (int64_t j = begin; j < last; j += kLine) __builtin_prefetch(next + j);
    int64_t j = begin;
    for (float* to = packed + k * 3 * W; j < threes; j += 3 * W, to += depth * 3 * W) {
      const auto x = loaded<W>(row + j), y = loaded<W>(row + j + W), z = loaded<W>(row + j + 2 * W);
      std::memcpy(to, &x, sizeof(x));
      std::memcpy(to + W, &y, sizeof(y));
      std::memcpy(to + 2 * W, &z, sizeof(z));
    }
    for (int64_t width; j < end; j += width) {
      width = vectors<W>(p, j) * W;
      float* to = packed + (j - begin) * depth + k * width;
      for (int64_t i = 0; i < width; ++i) to[i] = j + i < last ? row[j + i] : 0;
    }
  }
}

// Computes the tiles of one panel at column j for rows begin to end of c.
template <int W, int ROWS, int VECTORS>
INLINE void tiles(const Product& p, const float* panel, int64_t k0, int64_t depth, int64_t j, int64_t begin,
                  int64_t end, float* spare) {
  const int64_t columns = std::min<int64_t>(VECTORS * W, p.columns - j);
  for (int64_t i = begin; i < end; i += ROWS) {
    float* to[ROWS];
    const float* from[ROWS];
    for (int r = 0; r < ROWS; ++r) {  // rows past the end are computed into spare memory
      to[r] = i + r < end ? p.c.row(i + r) + j : spare;
      from[r] = p.a.row(std::min(i + r, end - 1)) + k0 * p.a.column_stride;
      const float* next = p.c.row(std::min(i + ROWS + r, p.rows - 1)) + j;
      for (int64_t column = 0; column < columns; column += kLine) __builtin_prefetch(next + column, 1);
    }
    tile<W, ROWS, VECTORS>(to, from, p.a.column_stride, panel, depth, columns, p.add || k0 > 0);
  }
}

// Multiplies with tiles that fill the registers: SHORT rows of three vectors, or LONG rows of two.
template <int W, int SHORT, int LONG>
INLINE void multiply_by(const Product& p) {
  static_assert(2 * LONG == 3 * SHORT);
  alignas(64) float packed[kBlock];
  float spare[3 * W] = {};
  for (int64_t k0 = 0; k0 < p.depth; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.depth - k0);
    for (int64_t begin = 0, end = 0; begin < p.columns; begin = end) {
      while (end < p.columns && (end - begin + vectors<W>(p, end) * W) * depth <= kBlock) end += vectors<W>(p, end) * W;
      pack<W>(packed, p, k0, depth, begin, end);
      for (int64_t i = 0; i < p.rows; i += 2 * LONG) {
        const int64_t last = std::min<int64_t>(i + 2 * LONG, p.rows);
        for (int64_t j = begin; j < end; j += vectors<W>(p, j) * W) {
          const float* panel = packed + (j - begin) * depth;
          if (vectors<W>(p, j) == 3) {
            tiles<W, SHORT, 3>(p, panel, k0, depth, j, i, last, spare);
          } else {
            tiles<W, LONG, 2>(p, panel, k0, depth, j, i, last, spare);
          }
        }
      }
    }
  }
}

__attribute__((target("arch=x86-64-v3"))) void multiply_v3(const Product& p) { multiply_by<8, 4, 6>(p); }
__attribute__((target("arch=x86-64-v4"))) void multiply_v4(const Product& p) { multiply_by<16, 8, 12>(p); }

__attribute__((target("arch=x86-64-v3"))) void transpose_v3(float* to, int64_t to_stride, const float* from,
                                                            int64_t from_stride, int64_t rows, int64_t columns) {
  transpose_by_8(to, to_stride, from, from_stride, rows, columns);
}

// The product for this processor, or nullptr.
void (*const multiply)(const Product&) = [] {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return multiply_v4;
  return __builtin_cpu_supports("x86-64-v3") ? multiply_v3 : nullptr;
}();
void (*const transpose)(float*, int64_t, const float*, int64_t, int64_t, int64_t) = transpose_v3;
#else
void (*const multiply)(const Product&) = nullptr;
void (*const transpose)(float*, int64_t, const float*, int64_t, int64_t, int64_t) = nullptr;
#endif

}  // namespace product
