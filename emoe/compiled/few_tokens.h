// Products of an FFN of experts for few tokens, which read each weight of a chosen expert once, where it lies.
//
// Few tokens are bound by the memory: product.h packs weights, which pays off for many tokens only. A neuron's weights
// are a row, so the first product is made of dot products and the second one adds scaled rows. Sums are in float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "product.h"

namespace few_tokens {

using product::Vector;

// tokens and neurons of a tile, whose sums stay in registers: 32 of them with AVX-512, else 16
template <int W>
constexpr int kTokens = W == 16 ? 4 : 2;
constexpr int kNeurons = 4;

// The tokens of the next tile: as many as fit, else two, or the last one.
template <int W>
INLINE int64_t tile_tokens(int64_t left) {
  if (left >= kTokens<W>) return kTokens<W>;
  return left >= 2 ? 2 : 1;
}

// Loads W numbers as floats. Bfloat16 is the upper half of a float.
template <int W>
INLINE typename Vector<W>::type loaded(const float* from) {
  return product::loaded<W>(from);
}

// Holds W halves of floats, and W whole ones.
template <int W>
struct Bits {
  typedef uint16_t half __attribute__((vector_size(W * sizeof(uint16_t))));
  typedef uint32_t whole __attribute__((vector_size(W * sizeof(uint32_t))));
};

template <int W>
INLINE typename Vector<W>::type loaded(const uint16_t* from) {
  typename Bits<W>::half upper;
  std::memcpy(&upper, from, sizeof(upper));
  const typename Bits<W>::whole bits = __builtin_convertvector(upper, typename Bits<W>::whole) << 16;
  typename Vector<W>::type vector;
  std::memcpy(&vector, &bits, sizeof(vector));
  return vector;
}

INLINE float number(const float* from) { return *from; }
INLINE float number(const uint16_t* from) {
  const uint32_t bits = static_cast<uint32_t>(*from) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Sums a vector's numbers by halves.
INLINE float total(Vector<4>::type v) { return (v[0] + v[1]) + (v[2] + v[3]); }
INLINE float total(Vector<8>::type v) {
  return total(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
INLINE float total(Vector<16>::type v) {
  return total(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}

// Adds the dot products of TOKENS inputs and kNeurons rows of weights; rows past `neurons` repeat the last one.
template <int W, int TOKENS, typename scalar_t>
INLINE void dot_tile(float* const* out, const float* const* x, const scalar_t* w, int64_t neurons, int64_t width) {
  typename Vector<W>::type sums[TOKENS][kNeurons];
  for (auto& row : sums) {
    for (auto& sum : row) sum = typename Vector<W>::type{};
  }
  const scalar_t* rows[kNeurons];
  for (int n = 0; n < kNeurons; ++n) rows[n] = w + std::min<int64_t>(n, neurons - 1) * width;
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    for (int n = 0; n < kNeurons; ++n) {
      const auto weights = loaded<W>(rows[n] + i);
      __builtin_prefetch(rows[n] + i + kNeurons * width);
      for (int t = 0; t < TOKENS; ++t) sums[t][n] += weights * product::loaded<W>(x[t] + i);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int n = 0; n < std::min<int64_t>(kNeurons, neurons); ++n) {
      float sum = total(sums[t][n]);
      for (int64_t rest = i; rest < width; ++rest) sum += number(rows[n] + rest) * x[t][rest];
      out[t][n] += sum;
    }
  }
}

// Adds the dot products of some tokens' inputs and an expert's rows of weights [size, width] to out.
template <int W, typename scalar_t>
INLINE void dots(float* const* out, const float* const* x, int64_t tokens, const scalar_t* w, int64_t size,
                 int64_t width) {
  for (int64_t n = 0; n < size; n += kNeurons) {
    for (int64_t t = 0; t < tokens; t += tile_tokens<W>(tokens - t)) {
      float* to[kTokens<W>];
      const int64_t count = tile_tokens<W>(tokens - t);
      for (int64_t r = 0; r < count; ++r) to[r] = out[t + r] + n;
      if (count == 1) {
        dot_tile<W, 1>(to, x + t, w + n * width, size - n, width);
      } else if (count == 2) {
        dot_tile<W, 2>(to, x + t, w + n * width, size - n, width);
      } else {
        dot_tile<W, kTokens<W>>(to, x + t, w + n * width, size - n, width);
      }
    }
  }
}

// Adds kNeurons rows of values, scaled by each token's neurons a, to columns begin to end of TOKENS outputs.
template <int W, int TOKENS, typename scalar_t>
INLINE void add_tile(float* const* out, const float* const* a, const scalar_t* v, int64_t neurons, int64_t width,
                     int64_t begin, int64_t end) {
  const scalar_t* rows[kNeurons];
  float scale[TOKENS][kNeurons];
  for (int n = 0; n < kNeurons; ++n) {
    rows[n] = v + std::min<int64_t>(n, neurons - 1) * width;
    for (int t = 0; t < TOKENS; ++t) scale[t][n] = n < neurons ? a[t][n] : 0;
  }
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    typename Vector<W>::type values[kNeurons];
    for (int n = 0; n < kNeurons; ++n) {
      values[n] = loaded<W>(rows[n] + i);
      __builtin_prefetch(rows[n] + i + kNeurons * width);
    }
    for (int t = 0; t < TOKENS; ++t) {
      auto sum = product::loaded<W>(out[t] + i);
      for (int n = 0; n < kNeurons; ++n) sum += scale[t][n] * values[n];
      std::memcpy(out[t] + i, &sum, sizeof(sum));
    }
  }
  for (; i < end; ++i) {
    for (int t = 0; t < TOKENS; ++t) {
      for (int n = 0; n < kNeurons; ++n) out[t][i] += scale[t][n] * number(rows[n] + i);
    }
  }
}

// Adds an expert's values [size, width], scaled by some tokens' neurons a, to columns begin to end of their outputs.
template <int W, typename scalar_t>
INLINE void add(float* const* out, const float* const* a, int64_t tokens, const scalar_t* v, int64_t size,
                int64_t width, int64_t begin, int64_t end) {
  for (int64_t n = 0; n < size; n += kNeurons) {
    for (int64_t t = 0; t < tokens; t += tile_tokens<W>(tokens - t)) {
      const float* from[kTokens<W>];
      const int64_t count = tile_tokens<W>(tokens - t);
      for (int64_t r = 0; r < count; ++r) from[r] = a[t + r] + n;
      if (count == 1) {
        add_tile<W, 1>(out + t, from, v + n * width, size - n, width, begin, end);
      } else if (count == 2) {
        add_tile<W, 2>(out + t, from, v + n * width, size - n, width, begin, end);
      } else {
        add_tile<W, kTokens<W>>(out + t, from, v + n * width, size - n, width, begin, end);
      }
    }
  }
}

#ifdef FOR_SEVERAL_PROCESSORS
template <typename scalar_t>
__attribute__((target("arch=x86-64-v4"))) void dots_v4(float* const* out, const float* const* x, int64_t tokens,
                                                       const scalar_t* w, int64_t size, int64_t width) {
  dots<16>(out, x, tokens, w, size, width);
}

template <typename scalar_t>
__attribute__((target("arch=x86-64-v4"))) void add_v4(float* const* out, const float* const* a, int64_t tokens,
                                                      const scalar_t* v, int64_t size, int64_t width, int64_t begin,
                                                      int64_t end) {
  add<16>(out, a, tokens, v, size, width, begin, end);
}

template <typename scalar_t>
__attribute__((target("arch=x86-64-v3"))) void dots_v3(float* const* out, const float* const* x, int64_t tokens,
                                                       const scalar_t* w, int64_t size, int64_t width) {
  dots<8>(out, x, tokens, w, size, width);
}

template <typename scalar_t>
__attribute__((target("arch=x86-64-v3"))) void add_v3(float* const* out, const float* const* a, int64_t tokens,
                                                      const scalar_t* v, int64_t size, int64_t width, int64_t begin,
                                                      int64_t end) {
  add<8>(out, a, tokens, v, size, width, begin, end);
}

const int level = [] {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  return __builtin_cpu_supports("x86-64-v3") ? 3 : 0;
}();
#endif

// The same for the processor at hand.
template <typename scalar_t>
void dots_here(float* const* out, const float* const* x, int64_t tokens, const scalar_t* w, int64_t size,
               int64_t width) {
#ifdef FOR_SEVERAL_PROCESSORS
  if (level == 4) return dots_v4(out, x, tokens, w, size, width);
  if (level == 3) return dots_v3(out, x, tokens, w, size, width);
#endif
  dots<4>(out, x, tokens, w, size, width);
}

template <typename scalar_t>
void add_here(float* const* out, const float* const* a, int64_t tokens, const scalar_t* v, int64_t size, int64_t width,
              int64_t begin, int64_t end) {
#ifdef FOR_SEVERAL_PROCESSORS
  if (level == 4) return add_v4(out, a, tokens, v, size, width, begin, end);
  if (level == 3) return add_v3(out, a, tokens, v, size, width, begin, end);
#endif
  add<4>(out, a, tokens, v, size, width, begin, end);
}

}  // namespace few_tokens
