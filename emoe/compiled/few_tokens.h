// Products of an FFN of experts for few tokens, which read each weight of a chosen expert once, where it lies.
//
// Few tokens are bound by the memory: product.h packs weights, which pays off for many tokens only. A neuron's weights
// are a row, so the first product is made of dot products and the second one adds scaled rows. Sums are in float32.
//
// Both work in tiles of a few tokens and neurons, so that a loaded weight serves all tokens of the tile. W is the
// number of floats in a vector register: 16 with AVX-512, 8 with AVX2, else 4. Weights have the type scalar_t: float,
// or uint16_t for the bits of bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "product.h"

namespace few_tokens {

using product::Vector;

// Tokens and neurons of a tile. Its sums stay in registers, of which there are 32 with AVX-512, else 16.
template <int W>
constexpr int kTokens = W == 16 ? 4 : 2;
constexpr int kNeurons = 4;

// Returns the tokens of the next tile: as many as fit, else two, or the last one.
template <int W>
INLINE int64_t tile_tokens(int64_t left) {
  if (left >= kTokens<W>) return kTokens<W>;
  return left >= 2 ? 2 : 1;
}

// Loads W numbers as floats.
template <int W>
INLINE typename Vector<W>::type loaded(const float* from) {
  return product::loaded<W>(from);
}

// Vectors of W halves of floats, and of W whole ones, as bits.
template <int W>
struct Bits {
  typedef uint16_t half __attribute__((vector_size(W * sizeof(uint16_t))));
  typedef uint32_t whole __attribute__((vector_size(W * sizeof(uint32_t))));
};

// The same for bfloat16, which is the upper half of a float.
template <int W>
INLINE typename Vector<W>::type loaded(const uint16_t* from) {
  typename Bits<W>::half upper;
  std::memcpy(&upper, from, sizeof(upper));
  const typename Bits<W>::whole bits = __builtin_convertvector(upper, typename Bits<W>::whole) << 16;
  typename Vector<W>::type vector;
  std::memcpy(&vector, &bits, sizeof(vector));
  return vector;
}

// Loads one number as a float.
INLINE float number(const float* from) { return *from; }
INLINE float number(const uint16_t* from) {
  const uint32_t bits = static_cast<uint32_t>(*from) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Sums a vector's numbers: adds its upper half to its lower half, and so on.
INLINE float total(Vector<4>::type v) { return (v[0] + v[1]) + (v[2] + v[3]); }
INLINE float total(Vector<8>::type v) {
  return total(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
INLINE float total(Vector<16>::type v) {
  return total(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}

// Finds the weights of each neuron of a tile in w [neurons, width]. If w has fewer neurons than a tile, its last one
// stands in for those that are missing, so that loops over neurons have a fixed length.
template <typename scalar_t>
INLINE void find_rows(const scalar_t* (&rows)[kNeurons], const scalar_t* w, int64_t neurons, int64_t width) {
  for (int n = 0; n < kNeurons; ++n) {
    const int64_t neuron = std::min<int64_t>(n, neurons - 1);
    rows[n] = w + neuron * width;
  }
}

// Adds the dot products of TOKENS inputs and the weights of the first kNeurons neurons.
//
// out: address of each token's outputs, one for each of these neurons.
// x: address of each token's inputs [width].
// w: weights [neurons, width], of these neurons and those after them.
template <int W, int TOKENS, typename scalar_t>
INLINE void dot_tile(float* const* out, const float* const* x, const scalar_t* w, int64_t neurons, int64_t width) {
  const scalar_t* rows[kNeurons];
  find_rows(rows, w, neurons, width);
  typename Vector<W>::type sums[TOKENS][kNeurons];
  // one by one, to stay in registers
  for (auto& token_sums : sums) {
    for (auto& sum : token_sums) sum = typename Vector<W>::type{};
  }
  // `i` outlives its loop: GCC sums the rest below with other roundings if the end is computed before the loop
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    for (int n = 0; n < kNeurons; ++n) {
      const auto weights = loaded<W>(rows[n] + i);
      // the same inputs' weights in the next tile
      __builtin_prefetch(rows[n] + i + kNeurons * width);
      for (int t = 0; t < TOKENS; ++t) sums[t][n] += weights * product::loaded<W>(x[t] + i);
    }
  }
  const int64_t vectors_end = i;
  const int64_t neurons_in_tile = std::min<int64_t>(kNeurons, neurons);
  for (int t = 0; t < TOKENS; ++t) {
    for (int n = 0; n < neurons_in_tile; ++n) {
      float sum = total(sums[t][n]);
      // inputs that do not fill a vector
      for (int64_t rest = vectors_end; rest < width; ++rest) sum += number(rows[n] + rest) * x[t][rest];
      out[t][n] += sum;
    }
  }
}

// Adds the dot products of some tokens' inputs and an expert's weights.
//
// out: address of each token's outputs [size].
// x: address of each token's inputs [width].
// w: the expert's weights [size, width], a row for each neuron.
template <int W, typename scalar_t>
INLINE void dots(float* const* out, const float* const* x, int64_t tokens, const scalar_t* w, int64_t size,
                 int64_t width) {
  for (int64_t n = 0; n < size; n += kNeurons) {
    const scalar_t* weights = w + n * width;
    const int64_t neurons_left = size - n;
    int64_t t = 0;
    while (t < tokens) {
      const int64_t count = tile_tokens<W>(tokens - t);
      float* to[kTokens<W>];
      for (int64_t i = 0; i < count; ++i) to[i] = out[t + i] + n;
      // the number of tokens is part of the type, so that the tile's sums stay in registers
      if (count == 1) {
        dot_tile<W, 1>(to, x + t, weights, neurons_left, width);
      } else if (count == 2) {
        dot_tile<W, 2>(to, x + t, weights, neurons_left, width);
      } else {
        dot_tile<W, kTokens<W>>(to, x + t, weights, neurons_left, width);
      }
      t += count;
    }
  }
}

// Adds the values of the first kNeurons neurons, scaled by each token's activations, to some columns of the outputs.
//
// out: address of each token's outputs [width].
// a: address of each token's activations of these neurons.
// v: values [neurons, width], of these neurons and those after them.
// begin, end: the columns are begin to end - 1.
template <int W, int TOKENS, typename scalar_t>
INLINE void add_tile(float* const* out, const float* const* a, const scalar_t* v, int64_t neurons, int64_t width,
                     int64_t begin, int64_t end) {
  const scalar_t* rows[kNeurons];
  find_rows(rows, v, neurons, width);
  float scale[TOKENS][kNeurons];
  for (int n = 0; n < kNeurons; ++n) {
    // the neurons that are missing add nothing
    const bool exists = n < neurons;
    for (int t = 0; t < TOKENS; ++t) scale[t][n] = exists ? a[t][n] : 0;
  }
  const int64_t vectors_end = end - (end - begin) % W;
  for (int64_t i = begin; i < vectors_end; i += W) {
    typename Vector<W>::type values[kNeurons];
    for (int n = 0; n < kNeurons; ++n) {
      values[n] = loaded<W>(rows[n] + i);
      // the same columns in the next tile
      __builtin_prefetch(rows[n] + i + kNeurons * width);
    }
    for (int t = 0; t < TOKENS; ++t) {
      auto sum = product::loaded<W>(out[t] + i);
      for (int n = 0; n < kNeurons; ++n) sum += scale[t][n] * values[n];
      product::store<W>(out[t] + i, sum);
    }
  }
  // columns that do not fill a vector
  for (int64_t i = vectors_end; i < end; ++i) {
    for (int t = 0; t < TOKENS; ++t) {
      for (int n = 0; n < kNeurons; ++n) out[t][i] += scale[t][n] * number(rows[n] + i);
    }
  }
}

// Adds an expert's values, scaled by some tokens' activations, to some columns of the tokens' outputs.
//
// out: address of each token's outputs [width].
// a: address of each token's activations [size].
// v: the expert's values [size, width], a row for each neuron.
// begin, end: the columns are begin to end - 1.
template <int W, typename scalar_t>
INLINE void add(float* const* out, const float* const* a, int64_t tokens, const scalar_t* v, int64_t size,
                int64_t width, int64_t begin, int64_t end) {
  for (int64_t n = 0; n < size; n += kNeurons) {
    const scalar_t* values = v + n * width;
    const int64_t neurons_left = size - n;
    int64_t t = 0;
    while (t < tokens) {
      const int64_t count = tile_tokens<W>(tokens - t);
      const float* from[kTokens<W>];
      for (int64_t i = 0; i < count; ++i) from[i] = a[t + i] + n;
      if (count == 1) {
        add_tile<W, 1>(out + t, from, values, neurons_left, width, begin, end);
      } else if (count == 2) {
        add_tile<W, 2>(out + t, from, values, neurons_left, width, begin, end);
      } else {
        add_tile<W, kTokens<W>>(out + t, from, values, neurons_left, width, begin, end);
      }
      t += count;
    }
  }
}

#ifdef FOR_SEVERAL_PROCESSORS
// The library is compiled for any x86-64, whose vectors have 4 floats. So both functions are compiled a second and a
// third time, for processors with AVX2 (x86-64-v3) and with AVX-512 (x86-64-v4).
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

// Returns the highest level of x86-64 that this processor has, of those compiled above: 4, 3, or 0 for neither.
inline int find_level() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
  return 0;
}

const int level = find_level();  // found once, when the library is loaded
#endif

// Calls `dots` compiled for this processor.
template <typename scalar_t>
void dots_here(float* const* out, const float* const* x, int64_t tokens, const scalar_t* w, int64_t size,
               int64_t width) {
#ifdef FOR_SEVERAL_PROCESSORS
  if (level == 4) return dots_v4(out, x, tokens, w, size, width);
  if (level == 3) return dots_v3(out, x, tokens, w, size, width);
#endif
  dots<4>(out, x, tokens, w, size, width);
}

// Calls `add` compiled for this processor.
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
