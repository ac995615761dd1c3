// Products of float matrices with rows at arbitrary addresses: tokens are neither gathered before nor scattered after.
//
// The usual method: blocks of b that fit the nearest caches are packed into panels as wide as a few vectors, and a tile
// of c stays in registers while it is summed. AVX2 and AVX-512 sum in the same order; other processors use PyTorch.
//
// W is the number of floats in a vector register: 8 with AVX2, 16 with AVX-512.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// Set if the compiler can compile one function for several processors, so that the library can choose at run time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_SEVERAL_PROCESSORS
#endif
// A function is compiled for a processor only if it is marked with it, or inlined into a marked function.
#define INLINE inline __attribute__((always_inline))

namespace product {

// Element (i, j) is data[row * row_stride + j * column_stride] with row = row_numbers ? row_numbers[i] : i.
template <typename scalar_t>
struct Matrix {
  scalar_t* data;
  const int64_t* row_numbers;  // nullptr if row i is row i of the data
  int64_t row_stride;
  int64_t column_stride;

  INLINE scalar_t* row(int64_t i) const {
    const int64_t row = row_numbers ? row_numbers[i] : i;
    return data + row * row_stride;
  }
};

// Computes c = a b, or c += a b.
//
// The column stride of c is 1. So is one stride of b; if it is the row stride, b has no row numbers.
struct Product {
  Matrix<float> c;        // [rows, columns]
  Matrix<const float> a;  // [rows, depth]
  Matrix<const float> b;  // [depth, columns]
  int64_t rows;
  int64_t columns;
  int64_t depth;
  bool add;
};

constexpr int64_t kLine = 16;  // floats per cache line

// A vector of W floats.
template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(W * sizeof(float))));
};

// Loads W floats from any address.
template <int W>
INLINE typename Vector<W>::type loaded(const float* from) {
  typename Vector<W>::type vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Stores W floats at any address.
template <int W>
INLINE void store(float* to, const typename Vector<W>::type& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

#ifdef FOR_SEVERAL_PROCESSORS
constexpr int64_t kDepth = 256;    // rows of b in a block
constexpr int64_t kBlock = 24576;  // floats in a block: 96 KiB
constexpr int64_t kAhead = 8;      // rows that are prefetched

// Loads some floats into the cache before they are read.
INLINE void prefetch(const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(from + i);
}

// Loads some floats into the cache before they are written.
INLINE void prefetch_for_writing(const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(from + i, 1);
}

// Writes the sums of a tile to c, or adds them, if c has all of the tile's columns.
template <int W, int ROWS, int VECTORS>
INLINE void write_whole_tile(float* const* c, const typename Vector<W>::type (&sums)[ROWS][VECTORS], bool add) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c[r] + v * W;
      auto sum = sums[r][v];
      if (add) sum += loaded<W>(to);
      store<W>(to, sum);
    }
  }
}

// Writes the given number of columns of a tile to c, or adds them.
template <int W, int ROWS, int VECTORS>
INLINE void write_part_of_tile(float* const* c, const typename Vector<W>::type (&sums)[ROWS][VECTORS], int64_t columns,
                               bool add) {
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      const float old = add ? c[r][j] : 0;
      c[r][j] = sums[r][j / W][j % W] + old;
    }
  }
}

// Computes a tile of c = a b, or c += a b. All its sums stay in registers until they are written.
//
// c: address of each of the ROWS rows of the tile.
// a: address of each row of a [depth], whose elements are a_stride apart.
// panel: columns of b [depth, VECTORS * W], contiguous.
// columns: number of columns that c has, at most VECTORS * W; the others are computed and not written.
template <int W, int ROWS, int VECTORS>
INLINE void multiply_tile(float* const* c, const float* const* a, int64_t a_stride, const float* panel, int64_t depth,
                          int64_t columns, bool add) {
  typename Vector<W>::type sums[ROWS][VECTORS];
  // one by one, to stay in registers: an initializer would fill memory
  for (auto& row : sums) {
    for (auto& sum : row) sum = typename Vector<W>::type{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* panel_row = panel + k * VECTORS * W;
    typename Vector<W>::type row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = loaded<W>(panel_row + v * W);
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += a[r][k * a_stride] * row[v];
    }
  }
  if (columns == VECTORS * W) {
    write_whole_tile<W, ROWS, VECTORS>(c, sums, add);
  } else {
    write_part_of_tile<W, ROWS, VECTORS>(c, sums, columns, add);
  }
}

// Transposes 8 by 8 floats: exchanges single floats, then pairs, then fours. Strides are the distances of rows.
INLINE void transpose_8(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  Vector<8>::type x[8];
  Vector<8>::type y[8];
  for (int i = 0; i < 8; ++i) x[i] = loaded<8>(from + i * from_stride);
  // between rows i and i + 1
  for (int i = 0; i < 8; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  // between rows i and i + 2
  for (int i : {0, 1, 4, 5}) {
    x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  // between rows i and i + 4
  for (int i = 0; i < 4; ++i) {
    y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) store<8>(to + i * to_stride, y[i]);
}

// Transposes a matrix [rows, columns] float by float.
INLINE void transpose_by_1(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                           int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// Transposes a matrix [rows, columns] in squares of 8 by 8 floats, and what is left at two edges float by float.
INLINE void transpose_by_8(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                           int64_t columns) {
  // the squares have these rows and columns
  const int64_t square_rows = rows - rows % 8;
  const int64_t square_columns = columns - columns % 8;
  for (int64_t i = 0; i < square_rows; i += 8) {
    // the next rows, while these are transposed: rows may be far apart, which the processor does not foresee
    const int64_t next_end = std::min(i + 16, rows);
    for (int64_t next = i + 8; next < next_end; ++next) prefetch(from + next * from_stride, columns);
    for (int64_t j = 0; j < square_columns; j += 8) {
      transpose_8(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
    }
    // columns right of the squares
    transpose_by_1(to + square_columns * to_stride + i, to_stride, from + i * from_stride + square_columns, from_stride,
                   8, columns - square_columns);
  }
  // rows below the squares
  transpose_by_1(to + square_rows, to_stride, from + square_rows * from_stride, from_stride, rows - square_rows,
                 columns);
}

// Width in vectors of the panel that starts at column j: two or three. Four remaining vectors become 2 + 2; 3 + 1 would
// leave columns empty, because no panel has one vector.
template <int W>
INLINE int panel_vectors(const Product& p, int64_t j) {
  const int64_t vectors_left = (p.columns - j + W - 1) / W;
  if (vectors_left == 1 || vectors_left == 2 || vectors_left == 4) return 2;
  return 3;
}

// Some rows and columns of b that are packed together. Its panels lie one after another, each [depth, width].
struct Block {
  int64_t first_row;
  int64_t depth;  // number of rows
  int64_t begin;  // first column
  int64_t end;    // where the last panel ends, which may be wider than the columns left

  // Returns where the panel that starts at column j begins in the packed block.
  INLINE int64_t panel_start(int64_t j) const { return (j - begin) * depth; }
};

// Packs a block of b with a row stride of 1, whose columns may be far apart. Columns past the end become zeros.
template <int W>
INLINE void pack_transposed(float* packed, const Product& p, const Block& block) {
  const Matrix<const float>& b = p.b;
  const int64_t columns_end = std::min(block.end, p.columns);
  int64_t j = block.begin;
  while (j < block.end) {
    float* panel = packed + block.panel_start(j);
    const int64_t width = panel_vectors<W>(p, j) * W;
    const int64_t columns = std::min(width, columns_end - j);
    if (columns < width) std::fill_n(panel, block.depth * width, 0.0f);
    transpose_by_8(panel, width, b.data + j * b.column_stride + block.first_row, b.column_stride, columns, block.depth);
    j += width;
  }
}

// Packs a block of b with a column stride of 1, whose rows may be far apart. Columns past the end become zeros.
template <int W>
INLINE void pack_rows(float* packed, const Product& p, const Block& block) {
  const Matrix<const float>& b = p.b;
  const int64_t columns_end = std::min(block.end, p.columns);
  // full panels of three vectors come first, and are copied in vectors
  constexpr int64_t kFull = 3 * W;
  int64_t full_end = block.begin;
  while (full_end + kFull <= columns_end && panel_vectors<W>(p, full_end) == 3) full_end += kFull;

  for (int64_t k = 0; k < block.depth; ++k) {
    const float* row = b.row(block.first_row + k);
    const int64_t later = std::min(k + kAhead, block.depth - 1);
    const float* later_row = b.row(block.first_row + later);
    prefetch(later_row + block.begin, columns_end - block.begin);

    // row k of each full panel
    float* to = packed + k * kFull;
    for (int64_t j = block.begin; j < full_end; j += kFull) {
      const auto first = loaded<W>(row + j);
      const auto second = loaded<W>(row + j + W);
      const auto third = loaded<W>(row + j + 2 * W);
      store<W>(to, first);
      store<W>(to + W, second);
      store<W>(to + 2 * W, third);
      to += block.depth * kFull;
    }
    // row k of each other panel
    int64_t j = full_end;
    while (j < block.end) {
      const int64_t width = panel_vectors<W>(p, j) * W;
      float* panel_row = packed + block.panel_start(j) + k * width;
      for (int64_t i = 0; i < width; ++i) {
        const bool exists = j + i < columns_end;
        panel_row[i] = exists ? row[j + i] : 0;
      }
      j += width;
    }
  }
}

// Multiplies rows begin to end - 1 of a by the panel of b that starts at column j, in tiles of ROWS rows.
//
// spare: VECTORS * W floats for results that nobody reads.
template <int W, int ROWS, int VECTORS>
INLINE void multiply_panel(const Product& p, const Block& block, const float* panel, int64_t j, int64_t begin,
                           int64_t end, float* spare) {
  const int64_t columns = std::min<int64_t>(VECTORS * W, p.columns - j);
  // blocks of later rows of b add to the sums of the first block
  const bool add = p.add || block.first_row > 0;
  for (int64_t i = begin; i < end; i += ROWS) {
    float* to[ROWS];
    const float* from[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      // A tile always has ROWS rows. Those past the end repeat the last row of a, and are written to spare memory.
      const bool exists = i + r < end;
      to[r] = exists ? p.c.row(i + r) + j : spare;
      const int64_t a_row = std::min(i + r, end - 1);
      from[r] = p.a.row(a_row) + block.first_row * p.a.column_stride;
      // the same row of the next tile
      const int64_t next_row = std::min(i + ROWS + r, p.rows - 1);
      prefetch_for_writing(p.c.row(next_row) + j, columns);
    }
    multiply_tile<W, ROWS, VECTORS>(to, from, p.a.column_stride, panel, block.depth, columns, add);
  }
}

// Returns the end of the columns from `begin` whose panels, with some rows of b, fit a block.
template <int W>
INLINE int64_t block_end(const Product& p, int64_t begin, int64_t depth) {
  int64_t end = begin;
  while (end < p.columns) {
    const int64_t next = end + panel_vectors<W>(p, end) * W;
    if ((next - begin) * depth > kBlock) break;
    end = next;
  }
  return end;
}

// Multiplies with tiles that fill the registers: SHORT rows of three vectors, or LONG rows of two.
template <int W, int SHORT, int LONG>
INLINE void multiply_with_tiles(const Product& p) {
  // the panels of a block are multiplied by so many rows of a before the next rows: tiles of both kinds fill them
  constexpr int64_t kRows = 2 * LONG;
  static_assert(kRows == 3 * SHORT);
  alignas(64) float packed[kBlock];
  float spare[3 * W] = {};
  Block block;
  for (block.first_row = 0; block.first_row < p.depth; block.first_row += kDepth) {
    block.depth = std::min(kDepth, p.depth - block.first_row);
    for (block.begin = 0; block.begin < p.columns; block.begin = block.end) {
      block.end = block_end<W>(p, block.begin, block.depth);
      if (p.b.column_stride == 1) {
        pack_rows<W>(packed, p, block);
      } else {
        pack_transposed<W>(packed, p, block);
      }
      for (int64_t i = 0; i < p.rows; i += kRows) {
        const int64_t rows_end = std::min(i + kRows, p.rows);
        int64_t j = block.begin;
        while (j < block.end) {
          const float* panel = packed + block.panel_start(j);
          const int vectors = panel_vectors<W>(p, j);
          if (vectors == 3) {
            multiply_panel<W, SHORT, 3>(p, block, panel, j, i, rows_end, spare);
          } else {
            multiply_panel<W, LONG, 2>(p, block, panel, j, i, rows_end, spare);
          }
          j += vectors * W;
        }
      }
    }
  }
}

// The library is compiled for any x86-64, whose vectors have 4 floats. So these functions are compiled a second and a
// third time: for processors with AVX2 (x86-64-v3: 16 registers of 8 floats), and with AVX-512 (x86-64-v4: 32 registers
// of 16 floats).
__attribute__((target("arch=x86-64-v3"))) void multiply_v3(const Product& p) { multiply_with_tiles<8, 4, 6>(p); }
__attribute__((target("arch=x86-64-v4"))) void multiply_v4(const Product& p) { multiply_with_tiles<16, 8, 12>(p); }

__attribute__((target("arch=x86-64-v3"))) void transpose_v3(float* to, int64_t to_stride, const float* from,
                                                            int64_t from_stride, int64_t rows, int64_t columns) {
  transpose_by_8(to, to_stride, from, from_stride, rows, columns);
}
#endif

using Multiply = void (*)(const Product&);
using Transpose = void (*)(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                           int64_t columns);

// Returns the version of the product for the best instructions that this processor has, or nullptr.
inline Multiply find_multiply() {
#ifdef FOR_SEVERAL_PROCESSORS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return multiply_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return multiply_v3;
#endif
  return nullptr;
}

// Computes a Product. nullptr if this processor has no version of it. Chosen once, when the library is loaded.
const Multiply multiply = find_multiply();

// Transposes a matrix [rows, columns]. For processors that have a `multiply`.
#ifdef FOR_SEVERAL_PROCESSORS
const Transpose transpose = transpose_v3;
#else
const Transpose transpose = nullptr;
#endif

}  // namespace product
