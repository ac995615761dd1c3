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

INLINE float as_float(uint32_t bits) {
  float found;
  std::memcpy(&found, &bits, sizeof(found));
  return found;
}

INLINE float wide(float value) { return value; }
INLINE float wide(at::BFloat16 value) { return as_float(static_cast<uint32_t>(value.x) << 16); }

// Numbers of a row that are read as one: two of bfloat16, each of which then costs one instruction.
template <typename scalar_t>
constexpr int64_t kAtOnce = sizeof(float) / sizeof(scalar_t);

// The first or second (float32: only) of those that are read in step j.
template <int part>
INLINE float number(const float* row, int64_t j) {
  return row[j];
}

template <int part>
INLINE float number(const at::BFloat16* row, int64_t j) {
  uint32_t two;
  std::memcpy(&two, row + 2 * j, sizeof(two));
  return as_float(part == 0 ? two << 16 : two & 0xffff0000u);
}

// What they are multiplied with, or added to, lies apart: the first of all steps, then the second of all steps, then what is left of an odd width.
template <typename scalar_t, bool back = false>
Tensor apart(const Tensor& rows) {
  if (kAtOnce<scalar_t> == 1) return rows;
  const int64_t width = rows.size(1), steps = width / 2;
  Tensor found = at::empty_like(rows);
  for (int64_t t = 0; t < rows.size(0); ++t) {
    const float* from = rows.const_data_ptr<float>() + t * width;
    float* to = found.mutable_data_ptr<float>() + t * width;
    if (width % 2) to[width - 1] = from[width - 1];
    for (int64_t j = 0; j < steps; ++j) {
      for (int64_t part = 0; part < 2; ++part) {
        const int64_t together = 2 * j + part, apart = part * steps + j;
        to[back ? together : apart] = from[back ? apart : together];
      }
    }
  }
  return found;
}

// x . row, in step j
template <typename scalar_t>
INLINE float times(const float* x, const scalar_t* row, int64_t j, int64_t steps) {
  float found = x[j] * number<0>(row, j);
  if (kAtOnce<scalar_t> == 2) found += x[steps + j] * number<1>(row, j);
  return found;
}

// Asks for numbers begin to end of the next four rows. Rows of bfloat16 are too short for the processor to see in time where they lead, so all of their
// lines are asked for; of float32 one in each of their pages, whose addresses have to be looked up where chosen experts lie far apart.
template <typename scalar_t>
INLINE void ask_for_four(const scalar_t* rows, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kAtOnce<scalar_t> == 1 ? 4096 / sizeof(scalar_t) : 64 / sizeof(scalar_t);
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = begin; j < end; j += kStep) __builtin_prefetch(rows + i * width + j, 0, 2);
  }
}

// out[i] = b[i] + x . w[i], for rows i of w, after which those at next are read
template <typename scalar_t>
INLINE void rows_times(scalar_t* out, const float* x, const scalar_t* w, const scalar_t* b, int64_t rows, int64_t width, const scalar_t* next) {
  const int64_t steps = width / kAtOnce<scalar_t>;
  const auto put = [&](int64_t i, float sum) {
    for (int64_t j = steps * kAtOnce<scalar_t>; j < width; ++j) sum += x[j] * wide(w[i * width + j]);
    out[i] = static_cast<scalar_t>(b ? sum + wide(b[i]) : sum);
  };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {  // four sums at a time, none of which waits for another
    const scalar_t *first = w + i * width, *second = first + width, *third = second + width, *fourth = third + width;
    ask_for_four(i + 8 <= rows ? fourth + width : next, width, 0, width);
    float a = 0, c = 0, d = 0, e = 0;
#pragma omp simd reduction(+ : a, c, d, e)
    for (int64_t j = 0; j < steps; ++j) {
      a += times(x, first, j, steps);
      c += times(x, second, j, steps);
      d += times(x, third, j, steps);
      e += times(x, fourth, j, steps);
    }
    put(i, a), put(i + 1, c), put(i + 2, d), put(i + 3, e);
  }
  for (; i < rows; ++i) {
    const scalar_t* row = w + i * width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < steps; ++j) sum += times(x, row, j, steps);
    put(i, sum);
  }
}

// sum += a . w, in steps begin to end of the rows of w, after which those at next are read
template <typename scalar_t>
INLINE void add_times_rows(float* sum, const float* a, const scalar_t* w, int64_t rows, int64_t width, int64_t begin, int64_t end,
                           const scalar_t* next) {
  const int64_t steps = width / kAtOnce<scalar_t>;
  // whoever takes the last step takes a column that is left of an odd width
  const int64_t left = end < steps ? width : steps * kAtOnce<scalar_t>;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {  // sums are read and written once for four rows
    const scalar_t *first = w + i * width, *second = first + width, *third = second + width, *fourth = third + width;
    ask_for_four(i + 8 <= rows ? fourth + width : next, width, begin * kAtOnce<scalar_t>, end * kAtOnce<scalar_t>);
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      sum[j] += (a[i] * number<0>(first, j) + a[i + 1] * number<0>(second, j)) + (a[i + 2] * number<0>(third, j) + a[i + 3] * number<0>(fourth, j));
      if (kAtOnce<scalar_t> == 2) {
        sum[steps + j] +=
            (a[i] * number<1>(first, j) + a[i + 1] * number<1>(second, j)) + (a[i + 2] * number<1>(third, j) + a[i + 3] * number<1>(fourth, j));
      }
    }
  }
  for (int64_t r = i; r < rows; ++r) {
    const scalar_t* row = w + r * width;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      sum[j] += a[r] * number<0>(row, j);
      if (kAtOnce<scalar_t> == 2) sum[steps + j] += a[r] * number<1>(row, j);
    }
  }
  for (int64_t j = left; j < width; ++j) {
    for (int64_t r = 0; r < rows; ++r) sum[j] += a[r] * wide(w[r * width + j]);
  }
}

FOR_EACH_PROCESSOR void rows_of(float* out, const float* x, const float* w, const float* b, int64_t rows, int64_t width, const float* next) {
  rows_times(out, x, w, b, rows, width, next);
}

FOR_EACH_PROCESSOR void rows_of(at::BFloat16* out, const float* x, const at::BFloat16* w, const at::BFloat16* b, int64_t rows, int64_t width,
                                const at::BFloat16* next) {
  rows_times(out, x, w, b, rows, width, next);
}

FOR_EACH_PROCESSOR void add_rows_of(float* sum, const float* a, const float* w, int64_t rows, int64_t width, int64_t begin, int64_t end,
                                    const float* next) {
  add_times_rows(sum, a, w, rows, width, begin, end, next);
}

FOR_EACH_PROCESSOR void add_rows_of(float* sum, const float* a, const at::BFloat16* w, int64_t rows, int64_t width, int64_t begin, int64_t end,
                                    const at::BFloat16* next) {
  add_times_rows(sum, a, w, rows, width, begin, end, next);
}

constexpr int64_t kFewest = 1 << 16;  // numbers that are worth a thread

// Items for each thread.
int64_t share(int64_t items) { return at::divup(items, at::get_num_threads()); }

// The (token, expert) pairs of experts [T, k], by expert: what one token has read of an expert is at hand for the next.
struct PairsByExpert {
  const Tensor experts;
  const int64_t* chosen;
  std::vector<int64_t> order;

  explicit PairsByExpert(const Tensor& of) : experts(of.contiguous()), chosen(experts.const_data_ptr<int64_t>()), order(experts.numel()) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return chosen[a] < chosen[b]; });
  }

  int64_t count() const { return static_cast<int64_t>(order.size()); }
  int64_t token(int64_t pair) const { return pair / experts.size(1); }
  // The expert of the pair in this place; past the last, of the last.
  int64_t expert(int64_t place) const { return chosen[order[std::min(place, count() - 1)]]; }
};

template <typename scalar_t>
void rows_mm_as(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                const PairsByExpert& pairs, std::vector<Tensor>& found, int64_t size) {
  const int64_t width = x.size(1);
  const Tensor inputs = apart<scalar_t>(x);
  at::parallel_for(0, pairs.count(), share(pairs.count()), [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const scalar_t* w = weights[i].const_data_ptr<scalar_t>();
      for (int64_t place = begin; place < end; ++place) {
        const int64_t pair = pairs.order[place], first = pairs.expert(place) * size, next = pairs.expert(place + 1) * size;
        rows_of(found[i].mutable_data_ptr<scalar_t>() + pair * size, inputs.const_data_ptr<float>() + pairs.token(pair) * width, w + first * width,
                biases[i] ? biases[i]->const_data_ptr<scalar_t>() + first : nullptr, size, width, w + next * width);
      }
    }
  });
}

// For each w [N, s * h] with its b [N, s]: x [T, h] times the rows of the chosen experts [T, k], plus theirs of b: [T, k * s]
std::vector<Tensor> rows_mm(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                            const Tensor& experts) {
  const int64_t size = weights[0].size(1) / x.size(1);
  const Tensor inputs = x.to(at::kFloat).contiguous();
  const PairsByExpert pairs(experts);
  std::vector<Tensor> found;
  for (size_t i = 0; i < weights.size(); ++i) found.push_back(at::empty({x.size(0), experts.size(1) * size}, weights[0].options()));
  if (weights[0].scalar_type() == at::kBFloat16) {
    rows_mm_as<at::BFloat16>(inputs, weights, biases, pairs, found, size);
  } else {
    rows_mm_as<float>(inputs, weights, biases, pairs, found, size);
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
  const int64_t tokens = x.size(0), experts = gate.size(0), width = x.size(1);
  const Tensor inputs = x.to(at::kFloat).contiguous(), keys = gate.contiguous();
  Tensor scores = at::empty({tokens, experts}, inputs.options());
  at::parallel_for(0, experts, std::max(share(experts), kFewest / width), [&](int64_t begin, int64_t end) {
    const float* first = keys.const_data_ptr<float>() + begin * width;
    for (int64_t t = 0; t < tokens; ++t) {
      rows_of(scores.mutable_data_ptr<float>() + t * experts + begin, inputs.const_data_ptr<float>() + t * width, first, nullptr, end - begin, width, first);
    }
  });
  const Tensor chosen = largest(scores, count);
  return {chosen, rows_mm(inputs, weights, biases, chosen)};
}

template <typename scalar_t>
Tensor values_mm_as(const Tensor& a, const Tensor& v, const PairsByExpert& pairs) {
  const int64_t tokens = a.size(0), size = a.size(1) / pairs.experts.size(1), width = v.size(1) / size, steps = width / kAtOnce<scalar_t>;
  Tensor sums = at::zeros({tokens, width}, a.options());
  const scalar_t* values = v.const_data_ptr<scalar_t>();
  // of a single column no step is made, and it is left
  const int64_t shared = std::max<int64_t>(steps, 1);
  at::parallel_for(0, shared, share(shared), [&](int64_t begin, int64_t end) {
    for (int64_t place = 0; place < pairs.count(); ++place) {
      const int64_t pair = pairs.order[place];
      add_rows_of(sums.mutable_data_ptr<float>() + pairs.token(pair) * width, a.const_data_ptr<float>() + pair * size,
                  values + pairs.expert(place) * size * width, size, width, begin, std::min(end, steps),
                  values + pairs.expert(place + 1) * size * width);
    }
  });
  return apart<scalar_t, true>(sums);
}

// a [T, k * s] times the values v [N, s * h] of the chosen experts [T, k]: [T, h]
Tensor values_mm(const Tensor& a, const Tensor& v, const Tensor& experts) {
  const Tensor hidden = a.to(at::kFloat).contiguous();
  const PairsByExpert pairs(experts);
  if (v.scalar_type() == at::kBFloat16) return values_mm_as<at::BFloat16>(hidden, v, pairs).to(a.scalar_type());
  return values_mm_as<float>(hidden, v, pairs);
}

}  // namespace
