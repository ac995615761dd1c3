// A vector times a few rows of weights, and the sum of a few rows, in float32; the rows are float32 or bfloat16 and are read once.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "processors.h"

#ifdef FOR_SEVERAL_PROCESSORS
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace few_rows {

using c10::BFloat16;

constexpr int64_t kLanes = 8, kRows = 4;  // numbers of a vector; rows that are read side by side
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// Numbers that are read as one: two of bfloat16, each of which then costs one instruction.
template <typename scalar_t>
constexpr int64_t kAtOnce = sizeof(float) / sizeof(scalar_t);

template <typename vector_t>
INLINE vector_t loaded(const void* from) {
  vector_t found;
  std::memcpy(&found, from, sizeof(found));
  return found;
}

INLINE float as_float(uint32_t bits) { return loaded<float>(&bits); }
INLINE float wide(float value) { return value; }
INLINE float wide(BFloat16 value) { return as_float(static_cast<uint32_t>(value.x) << 16); }

// The first or second (float32: only) of the numbers that are read in each of the steps from j on, as many as a vector has.
template <int part>
INLINE Floats numbers(const float* row, int64_t j) {
  return loaded<Floats>(row + j);
}

template <int part>
INLINE Floats numbers(const BFloat16* row, int64_t j) {
  const Bits two = loaded<Bits>(row + 2 * j);
  return reinterpret_cast<Floats>(part == 0 ? two << 16 : two & 0xffff0000u);
}

// What rows are multiplied with, or added to, lies apart: the first numbers of all steps, then the second of all steps, then what is left of an odd width.
template <typename scalar_t, bool back = false>
void copy_apart(float* to, const float* from, int64_t width) {
  const int64_t steps = width / kAtOnce<scalar_t>;
  std::copy_n(from + steps * kAtOnce<scalar_t>, width % kAtOnce<scalar_t>, to + steps * kAtOnce<scalar_t>);
  for (int64_t j = 0; j < steps; ++j) {
    for (int64_t part = 0; part < kAtOnce<scalar_t>; ++part) {
      const int64_t together = kAtOnce<scalar_t> * j + part, apart = part * steps + j;
      to[back ? together : apart] = from[back ? apart : together];
    }
  }
}

// Rows of weights one after the other, and those that are read when they have been.
template <typename scalar_t>
struct Block {
  const scalar_t* data;
  int64_t rows, width;
  const scalar_t* next;

  INLINE const scalar_t* row(int64_t i) const { return data + i * width; }

  // Where the rows lie that are read some time after row i.
  INLINE const scalar_t* ahead(int64_t i) const {
    const int64_t later = i + std::min(kAhead, rows);
    return later < rows ? row(later) : next + (later - rows) * width;
  }

  // Asks for what a few rows, beginning with this one, hold for step j. Rows of bfloat16 are too short for the processor to see in time where they lead,
  // so all of their lines are asked for; of float32 one in each of their pages, whose addresses have to be looked up where chosen experts lie far apart.
  template <int ROWS>
  INLINE void ask_for(const scalar_t* first, int64_t j) const {
    constexpr int64_t kEach = (kAtOnce<scalar_t> == 2 ? 64 : 4096) / sizeof(scalar_t);
    const int64_t place = j * kAtOnce<scalar_t>;
    if (place % kEach) return;
    for (int64_t r = 0; r < ROWS; ++r) __builtin_prefetch(first + r * width + place);
  }

 private:
  static constexpr int64_t kAhead = kAtOnce<scalar_t> == 2 ? 2 * kRows : kRows;
};

// Up to so many tokens that read the same rows.
constexpr int64_t kTokens = 2;
template <typename number_t>
using PerToken = std::array<number_t*, kTokens>;

// sums[t][i ...] = x[t] . rows i to i + ROWS of the block
template <int TOKENS, int ROWS, typename scalar_t>
INLINE void times_rows(const PerToken<float>& sums, const PerToken<const float>& x, const Block<scalar_t>& w, int64_t i) {
  // of one token the two numbers of a step are summed apart, so that no sum waits for another; of two there are sums enough, and no registers for more
  constexpr int64_t kSums = TOKENS == 1 ? kAtOnce<scalar_t> : 1;
  const int64_t steps = w.width / kAtOnce<scalar_t>, whole = steps / kLanes * kLanes;
  const scalar_t *row = w.row(i), *ahead = w.ahead(i);
  Floats found[TOKENS][ROWS][kSums];
  for (auto& of_token : found) {  // one by one, which stay in registers: an initialiser fills memory
    for (auto& of_row : of_token) {
      for (Floats& sum : of_row) sum = Floats{};
    }
  }
  for (int64_t j = 0; j < whole; j += kLanes) {
    w.template ask_for<ROWS>(ahead, j);
    for (int r = 0; r < ROWS; ++r) {
      const Floats first = numbers<0>(row + r * w.width, j);
      for (int t = 0; t < TOKENS; ++t) found[t][r][0] += loaded<Floats>(x[t] + j) * first;
      if (kAtOnce<scalar_t> == 1) continue;
      const Floats second = numbers<1>(row + r * w.width, j);
      for (int t = 0; t < TOKENS; ++t) found[t][r][kSums - 1] += loaded<Floats>(x[t] + steps + j) * second;
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < ROWS; ++r) {
      const scalar_t* own = row + r * w.width;
      float sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        for (const Floats& part : found[t][r]) sum += part[lane];
      }
      for (int64_t part = 0; part < kAtOnce<scalar_t>; ++part) {
        for (int64_t j = whole; j < steps; ++j) sum += x[t][part * steps + j] * wide(own[kAtOnce<scalar_t> * j + part]);
      }
      for (int64_t j = steps * kAtOnce<scalar_t>; j < w.width; ++j) sum += x[t][j] * wide(own[j]);
      sums[t][i + r] = sum;
    }
  }
}

// sum[t] += a[t] . rows i to i + ROWS of the block
template <int TOKENS, int ROWS, typename scalar_t>
INLINE void add_rows(const PerToken<float>& sum, const PerToken<const float>& a, const Block<scalar_t>& w, int64_t i) {
  const int64_t steps = w.width / kAtOnce<scalar_t>, whole = steps / kLanes * kLanes;
  const scalar_t *row = w.row(i), *ahead = w.ahead(i);
  float factors[TOKENS][ROWS], *to[TOKENS];
  for (int t = 0; t < TOKENS; ++t) {
    to[t] = sum[t];
    for (int r = 0; r < ROWS; ++r) factors[t][r] = a[t][i + r];
  }
  for (int64_t j = 0; j < whole; j += kLanes) {
    w.template ask_for<ROWS>(ahead, j);
    for (int t = 0; t < TOKENS; ++t) {
      Floats first = loaded<Floats>(to[t] + j);
      for (int r = 0; r < ROWS; ++r) first += factors[t][r] * numbers<0>(row + r * w.width, j);
      std::memcpy(to[t] + j, &first, sizeof(first));
      if (kAtOnce<scalar_t> == 1) continue;
      Floats second = loaded<Floats>(to[t] + steps + j);
      for (int r = 0; r < ROWS; ++r) second += factors[t][r] * numbers<1>(row + r * w.width, j);
      std::memcpy(to[t] + steps + j, &second, sizeof(second));
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < ROWS; ++r) {
      const scalar_t* own = row + r * w.width;
      for (int64_t part = 0; part < kAtOnce<scalar_t>; ++part) {
        for (int64_t j = whole; j < steps; ++j) sum[t][part * steps + j] += a[t][i + r] * wide(own[kAtOnce<scalar_t> * j + part]);
      }
      for (int64_t j = steps * kAtOnce<scalar_t>; j < w.width; ++j) sum[t][j] += a[t][i + r] * wide(own[j]);
    }
  }
}

template <int TOKENS, typename scalar_t>
INLINE void times_all(const PerToken<float>& sums, const PerToken<const float>& x, const Block<scalar_t>& w) {
  int64_t i = 0;
  for (; i + kRows <= w.rows; i += kRows) times_rows<TOKENS, kRows>(sums, x, w, i);
  for (; i < w.rows; ++i) times_rows<TOKENS, 1>(sums, x, w, i);
}

template <int TOKENS, typename scalar_t>
INLINE void add_all(const PerToken<float>& sum, const PerToken<const float>& a, const Block<scalar_t>& w) {
  int64_t i = 0;
  for (; i + kRows <= w.rows; i += kRows) add_rows<TOKENS, kRows>(sum, a, w, i);
  for (; i < w.rows; ++i) add_rows<TOKENS, 1>(sum, a, w, i);
}

// sums[t][i] = x[t] . row i, for one token or two
FOR_EACH_PROCESSOR void times(const PerToken<float>& sums, const PerToken<const float>& x, int64_t tokens, const Block<float>& w) {
  tokens == 1 ? times_all<1>(sums, x, w) : times_all<kTokens>(sums, x, w);
}

FOR_EACH_PROCESSOR void times(const PerToken<float>& sums, const PerToken<const float>& x, int64_t tokens, const Block<BFloat16>& w) {
  tokens == 1 ? times_all<1>(sums, x, w) : times_all<kTokens>(sums, x, w);
}

// sum[t] += a[t] . all rows, for one token or two
FOR_EACH_PROCESSOR void add(const PerToken<float>& sum, const PerToken<const float>& a, int64_t tokens, const Block<float>& w) {
  tokens == 1 ? add_all<1>(sum, a, w) : add_all<kTokens>(sum, a, w);
}

FOR_EACH_PROCESSOR void add(const PerToken<float>& sum, const PerToken<const float>& a, int64_t tokens, const Block<BFloat16>& w) {
  tokens == 1 ? add_all<1>(sum, a, w) : add_all<kTokens>(sum, a, w);
}

}  // namespace few_rows
