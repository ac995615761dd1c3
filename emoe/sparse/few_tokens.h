// The products of a few tokens: bound by memory, so weights are read where they lie, once, and only those of the chosen experts.
#pragma once

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "few_rows.h"
#include "neurons.h"

namespace {

using at::Tensor;
using few_rows::kTokens;
using few_rows::PerToken;
using few_rows::wide;
using Tensors = std::vector<Tensor>;
using Biases = std::vector<std::optional<Tensor>>;

constexpr int64_t kFewest = 1 << 16;  // numbers that are worth a thread

// Items for each thread.
int64_t share(int64_t items) { return at::divup(items, at::get_num_threads()); }

// Parts of equal size into which each of some experts is split, so that threads have a few shares each where there are few experts.
int64_t parts_of(int64_t experts, int64_t size) {
  const int64_t threads = at::get_num_threads();
  int64_t found = 1;
  for (int64_t parts = 1; threads > 1 && experts * found < 4 * threads && parts * few_rows::kRows <= size; ++parts) {
    if (size % parts == 0) found = parts;
  }
  return found;
}

// The (token, expert) pairs of experts [T, k], by expert: what one token has read of an expert is at hand for the next. Experts that are split are as many
// smaller ones: [T, k * parts].
struct PairsByExpert {
  const int64_t tokens, parts, each;  // pairs of each token
  std::vector<int64_t> chosen, order;

  PairsByExpert(const Tensor& of, int64_t size)
      : tokens(of.size(0)), parts(parts_of(of.numel(), size)), each(of.size(1) * parts), chosen(tokens * each), order(tokens * each) {
    const Tensor experts = of.contiguous();
    for (int64_t pair = 0; pair < count(); ++pair) chosen[pair] = experts.const_data_ptr<int64_t>()[pair / parts] * parts + pair % parts;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](int64_t a, int64_t b) { return chosen[a] < chosen[b]; });
  }

  int64_t count() const { return static_cast<int64_t>(order.size()); }
  int64_t token(int64_t pair) const { return pair / each; }
  // The expert of the pair in this place; past the last, of the last.
  int64_t expert(int64_t place) const { return chosen[order[std::min(place, count() - 1)]]; }

  // Calls f(place, tokens) for the pairs in places begin to end, for as many at once as read the same rows.
  template <typename F>
  void for_each(int64_t begin, int64_t end, const F& f) const {
    for (int64_t place = begin, tokens; place < end; place += tokens) {
      tokens = 1;
      while (tokens < kTokens && place + tokens < end && expert(place + tokens) == expert(place)) ++tokens;
      f(place, tokens);
    }
  }

  // For each of some pairs in a row its token's row, of rows that are width apart.
  template <typename number_t>
  PerToken<number_t> of_tokens(number_t* rows, int64_t width, int64_t place, int64_t tokens) const {
    PerToken<number_t> found{};
    for (int64_t i = 0; i < tokens; ++i) found[i] = rows + token(order[place + i]) * width;
    return found;
  }
};

template <typename scalar_t>
INLINE const scalar_t* pointer_to(const Tensor& of, int64_t place = 0) {
  return of.const_data_ptr<scalar_t>() + place;
}

// To the type of the weights and back, as numbers are that PyTorch hands from one operation to the next.
template <typename scalar_t>
INLINE float rounded(float value) {
  return wide(static_cast<scalar_t>(value));
}

// Rows [..., h] of float32 as the rows of weights are read.
template <typename scalar_t>
std::vector<float> apart(const Tensor& rows) {
  const int64_t width = rows.size(-1);
  std::vector<float> found(rows.numel());
  for (int64_t i = 0; i < rows.numel(); i += width) few_rows::copy_apart<scalar_t>(found.data() + i, pointer_to<float>(rows, i), width);
  return found;
}

// The weights of the in-projections, [N, s * h] each, and the biases [N, s] of those that have any; of experts that are split into parts.
template <typename scalar_t>
struct Inputs {
  const Tensors& weights;
  const Biases& biases;
  const int64_t width, size;

  Inputs(const Tensors& weights, const Biases& biases, int64_t width, int64_t parts)
      : weights(weights), biases(biases), width(width), size(weights[0].size(1) / width / parts) {}

  size_t count() const { return weights.size(); }
  const scalar_t* of(size_t i, int64_t expert) const { return pointer_to<scalar_t>(weights[i], expert * size * width); }

  // Pre-activations of some pairs in a row by the i-th of them, for tokens [T, h] as apart() lays them out; what lies at next is read then.
  void pre_activations(const PerToken<float>& found, size_t i, const PairsByExpert& pairs, int64_t place, int64_t count, const std::vector<float>& tokens,
                       const scalar_t* next) const {
    const int64_t expert = pairs.expert(place);
    few_rows::times(found, pairs.of_tokens(tokens.data(), width, place, count), count, {of(i, expert), size, width, next});
    const scalar_t* bias = biases[i] ? pointer_to<scalar_t>(*biases[i], expert * size) : nullptr;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t j = 0; j < size; ++j) found[t][j] = rounded<scalar_t>(bias ? found[t][j] + wide(bias[j]) : found[t][j]);
    }
  }
};

template <typename scalar_t>
void rows_mm_as(const Tensor& x, const Inputs<scalar_t>& inputs, const PairsByExpert& pairs, Tensors& found) {
  const std::vector<float> tokens = apart<scalar_t>(x);
  const int64_t size = inputs.size;
  at::parallel_for(0, pairs.count(), share(pairs.count()), [&](int64_t begin, int64_t end) {
    std::vector<float> pre(kTokens * size);
    for (size_t i = 0; i < inputs.count(); ++i) {
      scalar_t* to = found[i].mutable_data_ptr<scalar_t>();
      pairs.for_each(begin, end, [&](int64_t place, int64_t count) {
        inputs.pre_activations({pre.data(), pre.data() + size}, i, pairs, place, count, tokens, inputs.of(i, pairs.expert(place + count)));
        for (int64_t t = 0; t < count; ++t) std::copy_n(pre.data() + t * size, size, to + pairs.order[place + t] * size);
      });
    }
  });
}

// For each w [N, s * h] with its b [N, s]: x [T, h] times the rows of the chosen experts [T, k], plus theirs of b: [T, k * s]
Tensors rows_mm(const Tensor& x, const Tensors& weights, const Biases& biases, const Tensor& experts) {
  const Tensor tokens = x.to(at::kFloat).contiguous();
  const int64_t width = x.size(1), size = weights[0].size(1) / width;
  const PairsByExpert pairs(experts, size);
  Tensors found;
  for (size_t i = 0; i < weights.size(); ++i) found.push_back(at::empty({x.size(0), experts.size(1) * size}, weights[0].options()));
  if (weights[0].scalar_type() == at::kBFloat16) {
    rows_mm_as<at::BFloat16>(tokens, {weights, biases, width, pairs.parts}, pairs, found);
  } else {
    rows_mm_as<float>(tokens, {weights, biases, width, pairs.parts}, pairs, found);
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

// [T, k]: the experts whose mean keys, of all in gate [N, h], have the largest products with x [..., h]
Tensor chosen_by(const Tensor& gate, const Tensor& x, int64_t count) {
  const int64_t experts = gate.size(0), width = gate.size(1), tokens = x.numel() / width;
  const Tensor inputs = x.to(at::kFloat).contiguous(), keys = gate.contiguous();
  Tensor scores = at::empty({tokens, experts}, inputs.options());
  at::parallel_for(0, experts, std::max(share(experts), kFewest / width), [&](int64_t begin, int64_t end) {
    const float* first = pointer_to<float>(keys, begin * width);
    for (int64_t t = 0; t < tokens; t += kTokens) {
      float* to = scores.mutable_data_ptr<float>() + t * experts + begin;
      const float* x = pointer_to<float>(inputs, t * width);
      few_rows::times({to, to + experts}, {x, x + width}, std::min(kTokens, tokens - t), {first, end - begin, width, first});
    }
  });
  return largest(scores, count);
}

// Sums of this shape [..., width]: add(sums, place, count) adds what some pairs in a row have to add to those of their tokens, which are laid out as apart()
// does it; in the same order for as many threads.
template <typename scalar_t, typename F>
Tensor sum_pairs(const PairsByExpert& pairs, at::IntArrayRef shape, const at::TensorOptions& options, const F& add) {
  const int64_t width = shape.back(), numbers = pairs.tokens * width, own_pairs = share(pairs.count()), threads = at::divup(pairs.count(), own_pairs);
  const std::unique_ptr<float[]> sums(new float[threads * numbers]);  // cleared by the threads, each its own
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      float* own = sums.get() + thread * numbers;
      std::fill_n(own, numbers, 0.f);
      pairs.for_each(thread * own_pairs, std::min((thread + 1) * own_pairs, pairs.count()),
                     [&](int64_t place, int64_t count) { add(pairs.of_tokens(own, width, place, count), place, count); });
    }
  });
  at::parallel_for(0, numbers, kFewest / threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = 1; thread < threads; ++thread) {
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[thread * numbers + i];
    }
  });
  Tensor found = at::empty(shape, options);
  std::vector<float> row(width);
  for (int64_t t = 0; t < pairs.tokens; ++t) {
    few_rows::copy_apart<scalar_t, true>(row.data(), sums.get() + t * width, width);
    std::copy(row.begin(), row.end(), found.mutable_data_ptr<scalar_t>() + t * width);
  }
  return found;
}

template <typename scalar_t>
Tensor values_mm_as(const Tensor& a, const Tensor& values, const PairsByExpert& pairs) {
  const int64_t size = a.size(1) / pairs.each, width = values.size(1) / (size * pairs.parts);
  const auto of = [&](int64_t expert) { return pointer_to<scalar_t>(values, expert * size * width); };
  return sum_pairs<scalar_t>(pairs, {a.size(0), width}, values.options(), [&](const PerToken<float>& sums, int64_t place, int64_t count) {
    PerToken<const float> own{};
    for (int64_t t = 0; t < count; ++t) own[t] = pointer_to<float>(a, pairs.order[place + t] * size);
    few_rows::add(sums, own, count, {of(pairs.expert(place)), size, width, of(pairs.expert(place + count))});
  });
}

// a [T, k * s] times the values [N, s * h] of the chosen experts [T, k]: [T, h]
Tensor values_mm(const Tensor& a, const Tensor& values, const Tensor& experts) {
  const Tensor hidden = a.to(at::kFloat).contiguous();
  const PairsByExpert pairs(experts, a.size(1) / experts.size(1));
  return values.scalar_type() == at::kBFloat16 ? values_mm_as<at::BFloat16>(hidden, values, pairs) : values_mm_as<float>(hidden, values, pairs);
}

template <typename scalar_t>
Tensor ffn_mm_as(const Tensor& x, const Inputs<scalar_t>& inputs, const Tensor& values, neurons::Activation activation, const PairsByExpert& pairs,
                 const std::optional<Tensor>& scales) {
  const std::vector<float> tokens = apart<scalar_t>(x);
  const int64_t size = inputs.size, width = inputs.width, padded = at::divup(size, few_rows::kLanes) * few_rows::kLanes;
  const bool gated = inputs.count() > 1;
  return sum_pairs<scalar_t>(pairs, x.sizes(), values.options(), [&](const PerToken<float>& sums, int64_t place, int64_t count) {
    std::vector<float> memory(2 * kTokens * padded);
    const PerToken<float> hidden{memory.data(), memory.data() + padded}, factors{hidden[1] + padded, hidden[1] + 2 * padded};
    const int64_t expert = pairs.expert(place);
    const scalar_t* value = pointer_to<scalar_t>(values, expert * size * width);
    inputs.pre_activations(hidden, 0, pairs, place, count, tokens, gated ? inputs.of(1, expert) : value);
    if (gated) inputs.pre_activations(factors, 1, pairs, place, count, tokens, value);
    neurons::activate(activation, memory.data(), count * padded);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t j = 0; j < size; ++j) {
        float& neuron = hidden[t][j];
        neuron = rounded<scalar_t>(neuron);
        if (gated) neuron = rounded<scalar_t>(neuron * factors[t][j]);
        if (scales) neuron = rounded<scalar_t>(neuron * wide(pointer_to<scalar_t>(*scales)[pairs.order[place + t] / pairs.parts]));
      }
    }
    few_rows::add(sums, {hidden[0], hidden[1]}, count, {value, size, width, inputs.of(0, pairs.expert(place + count))});
  });
}

// [..., h], as x: the whole FFN of the chosen experts [T, k], whose outputs are weighted by scales [T, k] where they are given: rows_mm of one in-projection
// or two, the activation of that name, times what the second gave, and values_mm.
Tensor ffn_mm(const Tensor& x, const Tensors& weights, const Biases& biases, const Tensor& values, const std::string& activation, const Tensor& experts,
              const std::optional<Tensor>& scales) {
  const auto kind = neurons::activation_called(activation);
  const Tensor tokens = x.to(at::kFloat).contiguous();
  const int64_t width = x.size(-1);
  const PairsByExpert pairs(experts, values.size(1) / width);
  std::optional<Tensor> own;
  if (scales) own = scales->to(values.scalar_type()).contiguous();
  if (values.scalar_type() == at::kBFloat16) return ffn_mm_as<at::BFloat16>(tokens, {weights, biases, width, pairs.parts}, values, kind, pairs, own);
  return ffn_mm_as<float>(tokens, {weights, biases, width, pairs.parts}, values, kind, pairs, own);
}

}  // namespace
