// The products of a few tokens: bound by memory, so weights are read where they lie, once, and only those of the chosen experts.
#pragma once

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "processors.h"

#ifdef FOR_SEVERAL_PROCESSORS
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

using at::Tensor;

INLINE float wide(float value) { return value; }

INLINE float wide(at::BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof(found));
  return found;
}

// out[i] = b[i] + x . w[i], for rows i of w
template <typename scalar_t>
INLINE void rows_times(scalar_t* out, const float* x, const scalar_t* w, const scalar_t* b, int64_t rows, int64_t width) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {  // four sums at a time, none of which waits for another
    const scalar_t *first = w + i * width, *second = first + width, *third = second + width, *fourth = third + width;
    float a = 0, c = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, c, d, e)
    for (int64_t j = 0; j < width; ++j) {
      a += x[j] * wide(first[j]);
      c += x[j] * wide(second[j]);
      d += x[j] * wide(third[j]);
      e += x[j] * wide(fourth[j]);
    }
    const float sums[] = {a, c, d, e};
    for (int64_t r = 0; r < 4; ++r) out[i + r] = static_cast<scalar_t>(b ? sums[r] + wide(b[i + r]) : sums[r]);
  }
  for (; i < rows; ++i) {
    const scalar_t* row = w + i * width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) sum += x[j] * wide(row[j]);
    out[i] = static_cast<scalar_t>(b ? sum + wide(b[i]) : sum);
  }
}

// sum[j] += a . w[:, j], for columns begin to end of w [rows, width]
template <typename scalar_t>
INLINE void add_times_rows(float* sum, const float* a, const scalar_t* w, int64_t rows, int64_t width, int64_t begin, int64_t end) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {  // sums are read and written once for four rows
    const scalar_t *first = w + i * width, *second = first + width, *third = second + width, *fourth = third + width;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      sum[j] += (a[i] * wide(first[j]) + a[i + 1] * wide(second[j])) + (a[i + 2] * wide(third[j]) + a[i + 3] * wide(fourth[j]));
    }
  }
  for (; i < rows; ++i) {
    const scalar_t* row = w + i * width;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) sum[j] += a[i] * wide(row[j]);
  }
}

FOR_EACH_PROCESSOR void rows_of(float* out, const float* x, const float* w, const float* b, int64_t rows, int64_t width) {
  rows_times(out, x, w, b, rows, width);
}

FOR_EACH_PROCESSOR void rows_of(at::BFloat16* out, const float* x, const at::BFloat16* w, const at::BFloat16* b, int64_t rows,
                                int64_t width) {
  rows_times(out, x, w, b, rows, width);
}

FOR_EACH_PROCESSOR void add_rows_of(float* sum, const float* a, const float* w, int64_t rows, int64_t width, int64_t begin,
                                    int64_t end) {
  add_times_rows(sum, a, w, rows, width, begin, end);
}

FOR_EACH_PROCESSOR void add_rows_of(float* sum, const float* a, const at::BFloat16* w, int64_t rows, int64_t width, int64_t begin,
                                    int64_t end) {
  add_times_rows(sum, a, w, rows, width, begin, end);
}

// Has the addresses of what is read next looked up meanwhile, a page at a time: chosen experts lie far apart, and their pages are not in the
// processor's table of addresses.
template <typename scalar_t>
INLINE void ask_for(const scalar_t* w, int64_t count) {
  const char* begin = reinterpret_cast<const char*>(w);
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(scalar_t)); byte += 4096) __builtin_prefetch(begin + byte, 0, 2);
}

// Items for each thread.
int64_t share(int64_t items) { return at::divup(items, at::get_num_threads()); }

template <typename scalar_t>
void rows_mm_as(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                const Tensor& experts, std::vector<Tensor>& found, int64_t size) {
  const int64_t pairs = experts.numel(), count = experts.size(1), width = x.size(1);
  const float* inputs = x.const_data_ptr<float>();
  const int64_t* chosen = experts.const_data_ptr<int64_t>();
  at::parallel_for(0, pairs, share(pairs), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t first = chosen[pair] * size;
      for (size_t i = 0; i < weights.size(); ++i) {
        if (pair + 1 < end) ask_for(weights[i].const_data_ptr<scalar_t>() + chosen[pair + 1] * size * width, size * width);
        const scalar_t* b = biases[i] ? biases[i]->const_data_ptr<scalar_t>() + first : nullptr;
        rows_of(found[i].mutable_data_ptr<scalar_t>() + pair * size, inputs + pair / count * width,
                weights[i].const_data_ptr<scalar_t>() + first * width, b, size, width);
      }
    }
  });
}

// For each w [N, s * h] with its b [N, s]: x [T, h] times the rows of the chosen experts [T, k], plus theirs of b: [T, k * s]
std::vector<Tensor> rows_mm(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                            const Tensor& experts) {
  const int64_t size = weights[0].size(1) / x.size(1);
  const Tensor inputs = x.to(at::kFloat).contiguous(), chosen = experts.contiguous();
  std::vector<Tensor> found;
  for (size_t i = 0; i < weights.size(); ++i) found.push_back(at::empty({x.size(0), experts.size(1) * size}, x.options()));
  if (x.scalar_type() == at::kBFloat16) {
    rows_mm_as<at::BFloat16>(inputs, weights, biases, chosen, found, size);
  } else {
    rows_mm_as<float>(inputs, weights, biases, chosen, found, size);
  }
  return found;
}

// [T, k]: the places of the k largest scores [T, N] in float32, the largest first; of equal ones the lower place, and NaN before all, as a stable sort has them
Tensor largest(const Tensor& scores, int64_t count) {
  const Tensor values = scores.contiguous();
  const int64_t experts = values.size(1);
  Tensor found = at::empty({values.size(0), count}, values.options().dtype(at::kLong));
  std::vector<int64_t> order(experts);
  for (int64_t t = 0; t < values.size(0); ++t) {
    const float* score = values.const_data_ptr<float>() + t * experts;
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + count, order.end(), [score](int64_t a, int64_t b) {
      const bool nan_a = std::isnan(score[a]), nan_b = std::isnan(score[b]);
      if (nan_a || nan_b) return nan_a == nan_b ? a < b : nan_a;
      return score[a] == score[b] ? a < b : score[a] > score[b];
    });
    std::copy_n(order.begin(), count, found.mutable_data_ptr<int64_t>() + t * count);
  }
  return found;
}

// [T, k] experts whose mean keys, of all in gate [N, h], have the largest products with x [T, h]; and rows_mm of these
std::pair<Tensor, std::vector<Tensor>> chosen_rows_mm(const Tensor& x, const Tensor& gate, int64_t count, const std::vector<Tensor>& weights,
                                                      const std::vector<std::optional<Tensor>>& biases) {
  const Tensor experts = largest(at::linear(x.to(at::kFloat), gate), count);
  return {experts, rows_mm(x, weights, biases, experts)};
}

template <typename scalar_t>
void values_mm_as(const Tensor& a, const Tensor& v, const Tensor& experts, Tensor& sums) {
  const int64_t tokens = a.size(0), count = experts.size(1), size = a.size(1) / count, width = sums.size(1);
  const float* hidden = a.const_data_ptr<float>();
  const int64_t* chosen = experts.const_data_ptr<int64_t>();
  at::parallel_for(0, width, share(width), [&](int64_t begin, int64_t end) {
    for (int64_t pair = 0; pair < tokens * count; ++pair) {
      if (pair + 1 < tokens * count) ask_for(v.const_data_ptr<scalar_t>() + chosen[pair + 1] * size * width, size * width);
      add_rows_of(sums.mutable_data_ptr<float>() + pair / count * width, hidden + pair * size,
                  v.const_data_ptr<scalar_t>() + chosen[pair] * size * width, size, width, begin, end);
    }
  });
}

// a [T, k * s] times the values v [N, s * h] of the chosen experts [T, k]: [T, h]
Tensor values_mm(const Tensor& a, const Tensor& v, const Tensor& experts) {
  const Tensor hidden = a.to(at::kFloat).contiguous(), chosen = experts.contiguous();
  const int64_t size = a.size(1) / experts.size(1);
  Tensor sums = at::zeros({a.size(0), v.size(1) / size}, hidden.options());
  if (v.scalar_type() == at::kBFloat16) {
    values_mm_as<at::BFloat16>(hidden, v, chosen, sums);
  } else {
    values_mm_as<float>(hidden, v, chosen, sums);
  }
  return sums.to(a.scalar_type());
}

}  // namespace
