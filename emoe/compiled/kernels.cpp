// The kernels of an FFN of experts on a CPU, called from Python.
//
// gather_mm, scatter_mm and outer_mm compute the three products for the chosen (token, expert) pairs: in float32 with
// product.h if the processor supports it, else with PyTorch. The other kernels are for passes without gradient: the
// choice of experts (choose, route), the masking of neurons (scale_blocks), both at once (mask_neurons), and two
// products for few tokens (few_gather_mm, few_scatter_mm, with few_tokens.h).
//
// Shapes: T tokens, N experts of s neurons, h width of a token, P pairs of a token and a chosen expert.
//
// Pairs are sorted by chunk of tokens, then expert, then token: those of chunk c and expert n, a block, are pairs
// starts[c * N + n] to starts[c * N + n + 1] - 1. Chunks share no token and experts share no weight, so each product
// runs in parallel without locks, and in the same order for the same number of chunks.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "few_tokens.h"
#include "product.h"

namespace {

using at::Tensor;

// The pairs of one chunk of tokens and one expert.
struct Block {
  int64_t expert;
  int64_t start;          // number of the first pair
  int64_t count;          // number of pairs
  const int64_t* tokens;  // token number of each pair [count]
};

// The chosen (token, expert) pairs, sorted as described above.
struct Pairs {
  Tensor token_numbers;         // of each pair, int64 [P]
  std::vector<int64_t> starts;  // first pair of each block, and P [chunks * N + 1]
  int64_t chunks;
  int64_t experts;

  Pairs(const Tensor& token_numbers, const Tensor& starts, int64_t experts)
      : token_numbers(token_numbers),
        starts(starts.data_ptr<int64_t>(), starts.data_ptr<int64_t>() + starts.numel()),
        chunks((starts.numel() - 1) / experts),
        experts(experts) {}

  Block block(int64_t chunk, int64_t expert) const {
    const int64_t number = chunk * experts + expert;
    const int64_t start = starts[number];
    const int64_t count = starts[number + 1] - start;
    return {expert, start, count, token_numbers.const_data_ptr<int64_t>() + start};
  }

  // Returns the number of pairs in the largest block.
  int64_t largest_count() const {
    int64_t largest = 0;
    for (size_t i = 1; i < starts.size(); ++i) largest = std::max(largest, starts[i] - starts[i - 1]);
    return largest;
  }

  // Allocates a row for each pair of any block: an allocation per block would cost page faults.
  Tensor buffer(const Tensor& like, int64_t width) const { return at::empty({largest_count(), width}, like.options()); }

  // Calls f(block, buffer) for each non-empty block, chunks in parallel. The buffer is undefined in a thread's first
  // call. What f assigns to it, the thread's next call gets.
  template <typename F>
  void each_block(const F& f) const {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;  // these threads record no gradient
      Tensor buffer;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        for (int64_t expert = 0; expert < experts; ++expert) {
          const Block pairs = block(chunk, expert);
          if (pairs.count > 0) f(pairs, buffer);
        }
      }
    });
  }
};

// Copies the rows of a block's tokens from x [T, h] to the start of a buffer, and returns them [count, h].
Tensor gather_tokens(Tensor& buffer, const Tensor& x, const Pairs& pairs, const Block& block) {
  Tensor rows = buffer.narrow(0, 0, block.count);
  const Tensor token_numbers = pairs.token_numbers.narrow(0, block.start, block.count);
  at::index_select_out(rows, x, 0, token_numbers);
  return rows;
}

// Checks if product.h can multiply: the processor supports it, a is in float32, and the rows or the columns of each
// expert's weight w [N, s, h] are contiguous. Weights have the dtype of a.
bool can_use_product(const Tensor& a, const Tensor& w) {
  if (!product::multiply) return false;
  const bool has_contiguous_columns = w.stride(1) == 1;
  const bool has_contiguous_rows = w.stride(2) == 1;
  return a.scalar_type() == at::kFloat && (has_contiguous_rows || has_contiguous_columns);
}

// Writes a row to each of `count` rows.
void repeat_row(float* to, const float* row, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) std::copy_n(row, size, to + i * size);
}

// Computes gather_mm with product.h.
void gather_mm_directly(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, const Pairs& pairs,
                        Tensor& out) {
  const int64_t size = w.size(1);
  const int64_t width = w.size(2);
  const Tensor biases = b ? b->contiguous() : Tensor();
  pairs.each_block([&](const Block& block, Tensor&) {
    // the block's rows of the result [count, s]
    const product::Matrix<float> to = {
        /*data=*/out.data_ptr<float>() + block.start * size,
        /*row_numbers=*/nullptr,
        /*row_stride=*/size,
        /*column_stride=*/1,
    };
    // its tokens [count, h], read where they lie
    const product::Matrix<const float> inputs = {
        /*data=*/x.const_data_ptr<float>(),
        /*row_numbers=*/block.tokens,
        /*row_stride=*/width,
        /*column_stride=*/1,
    };
    // strides exchanged: the expert's transposed weight [h, s]
    const product::Matrix<const float> weights = {
        /*data=*/w.const_data_ptr<float>() + block.expert * w.stride(0),
        /*row_numbers=*/nullptr,
        /*row_stride=*/w.stride(2),
        /*column_stride=*/w.stride(1),
    };
    // the product is added to the bias
    if (b) repeat_row(to.data, biases.const_data_ptr<float>() + block.expert * size, block.count, size);
    product::multiply({to, inputs, weights, /*rows=*/block.count, /*columns=*/size, /*depth=*/width,
                       /*add=*/b.has_value()});
  });
}

// Multiplies each pair's token by its expert's weight, and adds the expert's bias.
//
// x: a row for each token [T, h], contiguous.
// w: weights [N, s, h].
// b: biases [N, s], or none.
// token_numbers: token number of each pair [P].
// starts: first pair of each block [chunks * N + 1].
//
// Returns the products [P, s].
Tensor gather_mm(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, const Tensor& token_numbers,
                 const Tensor& starts) {
  const Pairs pairs(token_numbers, starts, w.size(0));
  const int64_t size = w.size(1);
  const int64_t width = w.size(2);
  Tensor out = at::empty({token_numbers.size(0), size}, x.options());
  if (can_use_product(x, w)) {
    gather_mm_directly(x, w, b, pairs, out);
    return out;
  }
  pairs.each_block([&](const Block& block, Tensor& buffer) {
    if (!buffer.defined()) buffer = pairs.buffer(x, width);
    const Tensor inputs = gather_tokens(buffer, x, pairs, block);
    const Tensor weight = w.select(0, block.expert).t();
    Tensor to = out.narrow(0, block.start, block.count);
    if (b) {
      at::addmm_out(to, b->select(0, block.expert), inputs, weight);
    } else {
      at::mm_out(to, inputs, weight);
    }
  });
  return out;
}

// Computes scatter_mm with product.h, which adds to sums [T, h].
void scatter_mm_directly(const Tensor& a, const Tensor& w, const Pairs& pairs, Tensor& sums) {
  const int64_t size = w.size(1);
  const int64_t width = w.size(2);
  pairs.each_block([&](const Block& block, Tensor&) {
    // the sums of the block's tokens [count, h], written where they lie
    const product::Matrix<float> to = {
        /*data=*/sums.data_ptr<float>(),
        /*row_numbers=*/block.tokens,
        /*row_stride=*/width,
        /*column_stride=*/1,
    };
    // the block's rows [count, s]
    const product::Matrix<const float> inputs = {
        /*data=*/a.const_data_ptr<float>() + block.start * size,
        /*row_numbers=*/nullptr,
        /*row_stride=*/size,
        /*column_stride=*/1,
    };
    // the expert's weight [s, h]
    const product::Matrix<const float> weights = {
        /*data=*/w.const_data_ptr<float>() + block.expert * w.stride(0),
        /*row_numbers=*/nullptr,
        /*row_stride=*/w.stride(1),
        /*column_stride=*/w.stride(2),
    };
    product::multiply({to, inputs, weights, /*rows=*/block.count, /*columns=*/width, /*depth=*/size, /*add=*/true});
  });
}

// Adds each row [count, h] to the sums [T, h] of its token.
template <typename sum_t, typename scalar_t>
void add_to_tokens(Tensor& sums, const Tensor& rows, const int64_t* token_numbers) {
  const int64_t width = sums.size(1);
  for (int64_t i = 0; i < rows.size(0); ++i) {
    sum_t* __restrict to = sums.data_ptr<sum_t>() + token_numbers[i] * width;
    const scalar_t* __restrict from = rows.data_ptr<scalar_t>() + i * width;
    for (int64_t j = 0; j < width; ++j) to[j] += static_cast<sum_t>(from[j]);
  }
}

// Sums over pairs are in float32 (float64 for float64), whatever the dtype of the weights.
at::ScalarType sum_type(const Tensor& a) { return a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Multiplies each pair's row by its expert's weight, and sums the products of each token's pairs.
//
// a: a row for each pair [P, s], contiguous.
// w: weights [N, s, h].
// token_numbers: token number of each pair [P].
// starts: first pair of each block [chunks * N + 1].
// tokens: number of tokens T.
//
// Returns the sums [T, h].
Tensor scatter_mm(const Tensor& a, const Tensor& w, const Tensor& token_numbers, const Tensor& starts, int64_t tokens) {
  const Pairs pairs(token_numbers, starts, w.size(0));
  const int64_t width = w.size(2);
  Tensor sums = at::zeros({tokens, width}, a.options().dtype(sum_type(a)));
  if (can_use_product(a, w)) {
    scatter_mm_directly(a, w, pairs, sums);
    return sums;
  }
  pairs.each_block([&](const Block& block, Tensor& buffer) {
    if (!buffer.defined()) buffer = pairs.buffer(a, width);
    Tensor products = buffer.narrow(0, 0, block.count);
    at::mm_out(products, a.narrow(0, block.start, block.count), w.select(0, block.expert));
    if (a.scalar_type() == at::kDouble) {
      add_to_tokens<double, double>(sums, products, block.tokens);
    } else if (a.scalar_type() == at::kBFloat16) {
      add_to_tokens<float, at::BFloat16>(sums, products, block.tokens);
    } else {
      add_to_tokens<float, float>(sums, products, block.tokens);
    }
  });
  return sums.to(a.scalar_type());
}

// Sums one expert's outer products with product.h.
//
// a: a row for each pair [P, s].
// x: a row for each token [T, h].
// to: memory for the sums [s, h], whose rows are `stride` floats apart.
//
// Returns whether the expert has pairs. If not, nothing is written.
bool sum_of_expert(const Tensor& a, const Tensor& x, const Pairs& pairs, int64_t expert, float* to, int64_t stride) {
  const int64_t size = a.size(1);
  const int64_t width = x.size(1);
  const product::Matrix<float> sums = {
      /*data=*/to,
      /*row_numbers=*/nullptr,
      /*row_stride=*/stride,
      /*column_stride=*/1,
  };
  bool has_pairs = false;
  for (int64_t chunk = 0; chunk < pairs.chunks; ++chunk) {
    const Block block = pairs.block(chunk, expert);
    if (block.count == 0) continue;
    // strides exchanged: the block's transposed rows [s, count]
    const product::Matrix<const float> neurons = {
        /*data=*/a.const_data_ptr<float>() + block.start * size,
        /*row_numbers=*/nullptr,
        /*row_stride=*/1,
        /*column_stride=*/size,
    };
    // the block's tokens [count, h], read where they lie
    const product::Matrix<const float> inputs = {
        /*data=*/x.const_data_ptr<float>(),
        /*row_numbers=*/block.tokens,
        /*row_stride=*/width,
        /*column_stride=*/1,
    };
    // the first product overwrites the memory, the others are added
    product::multiply({sums, neurons, inputs, /*rows=*/size, /*columns=*/width, /*depth=*/block.count,
                       /*add=*/has_pairs});
    has_pairs = true;
  }
  return has_pairs;
}

// Computes outer_mm with product.h.
void outer_mm_directly(const Tensor& a, const Tensor& x, const Pairs& pairs, Tensor& out) {
  const int64_t size = out.size(1);
  const int64_t width = out.size(2);
  // product.h needs contiguous rows. If `out` has contiguous columns, sums are computed elsewhere, then transposed.
  const bool has_contiguous_rows = out.stride(2) == 1;
  at::parallel_for(0, pairs.experts, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<float> elsewhere;
    int64_t stride = out.stride(1);
    if (!has_contiguous_rows) {
      // one cache line longer than a row: rows would otherwise map to the same few cache sets
      stride = width + product::kLine;
      elsewhere.resize(size * stride);
    }
    for (int64_t expert = begin; expert < end; ++expert) {
      float* result = out.data_ptr<float>() + expert * out.stride(0);
      float* sums = has_contiguous_rows ? result : elsewhere.data();
      const bool has_pairs = sum_of_expert(a, x, pairs, expert, sums, stride);
      if (!has_pairs) {
        out.select(0, expert).zero_();
      } else if (!has_contiguous_rows) {
        product::transpose(result, out.stride(2), sums, stride, size, width);
      }
    }
  });
}

// Sums the outer products of a[pair] and x[token of the pair] over each expert's pairs.
//
// a: a row for each pair [P, s], contiguous.
// x: a row for each token [T, h], contiguous.
// token_numbers: token number of each pair [P].
// starts: first pair of each block [chunks * N + 1].
// out: memory for the sums [N, s, h], in the layout of the weights.
void outer_mm(const Tensor& a, const Tensor& x, const Tensor& token_numbers, const Tensor& starts, Tensor out) {
  const Pairs pairs(token_numbers, starts, out.size(0));
  if (can_use_product(a, out)) {
    outer_mm_directly(a, x, pairs, out);
    return;
  }
  const bool has_dtype_of_sums = out.scalar_type() == sum_type(a);
  at::parallel_for(0, pairs.experts, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor buffer = pairs.buffer(x, x.size(1));
    for (int64_t expert = begin; expert < end; ++expert) {
      Tensor result = out.select(0, expert);
      Tensor sum;  // of all chunks, if there are several and the dtype of the result is too coarse to sum them
      bool has_pairs = false;
      for (int64_t chunk = 0; chunk < pairs.chunks; ++chunk) {
        const Block block = pairs.block(chunk, expert);
        if (block.count == 0) continue;
        const Tensor neurons = a.narrow(0, block.start, block.count).t();
        const Tensor inputs = gather_tokens(buffer, x, pairs, block);
        if (!has_pairs) {
          at::mm_out(result, neurons, inputs);
        } else if (has_dtype_of_sums) {
          result.addmm_(neurons, inputs);
        } else {
          if (!sum.defined()) sum = result.to(sum_type(a));
          sum.add_(at::mm(neurons, inputs));
        }
        has_pairs = true;
      }
      if (!has_pairs) result.zero_();
      if (sum.defined()) result.copy_(sum);
    }
  });
}

// Writes to `ranked` what is ranked instead of one token's scores [N], so that the highest are chosen. NaN counts as
// infinity.
INLINE void rank_scores(std::vector<float>& ranked, const float* scores, bool highest) {
  for (size_t i = 0; i < ranked.size(); ++i) {
    const float score = std::isnan(scores[i]) ? std::numeric_limits<float>::infinity() : scores[i];
    ranked[i] = highest ? score : -score;
  }
}

// Marks the k highest of one token's scores [N] in `chosen` [N]. Overwrites `scratch` [N].
INLINE void mark_highest(bool* chosen, const std::vector<float>& ranked, int64_t k, std::vector<float>& scratch) {
  const int64_t experts = ranked.size();
  scratch = ranked;
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
  const float lowest = scratch[k - 1];  // of the chosen scores
  // Several experts may have the lowest score. Those above it leave places for some of them.
  int64_t ties_left = k;
  for (int64_t i = 0; i < experts; ++i) {
    if (ranked[i] > lowest) --ties_left;
  }
  for (int64_t i = 0; i < experts; ++i) {
    const bool takes_tie = ranked[i] == lowest && ties_left > 0;
    if (takes_tie) --ties_left;
    chosen[i] = ranked[i] > lowest || takes_tie;
  }
}

// Chooses the experts of each token with the k highest scores, or the k lowest. Among equal scores, experts of lower
// index are chosen first. NaN counts as infinity.
struct Choice {
  int64_t k;
  bool highest;
  std::vector<float> ranked;
  std::vector<float> scratch;

  Choice(int64_t experts, int64_t k, bool highest) : k(k), highest(highest), ranked(experts), scratch(experts) {}

  // Writes the mask of one token's experts [N]. Their scores are [N].
  void operator()(bool* chosen, const float* scores) {
    rank_scores(ranked, scores, highest);
    mark_highest(chosen, ranked, k, scratch);
  }
};

// Chooses experts as Choice does.
//
// scores: a score for each token and expert [T, N], float32.
//
// Returns the mask of the chosen experts [T, N], bool.
Tensor choose(const Tensor& scores, int64_t k, bool highest) {
  constexpr int64_t kTokensPerTask = 256;
  const int64_t tokens = scores.size(0);
  const int64_t experts = scores.size(1);
  const Tensor contiguous_scores = scores.contiguous();
  Tensor mask = at::empty({tokens, experts}, scores.options().dtype(at::kBool));
  const float* from = contiguous_scores.const_data_ptr<float>();
  bool* to = mask.data_ptr<bool>();
  at::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    Choice choice(experts, k, highest);
    for (int64_t token = begin; token < end; ++token) choice(to + token * experts, from + token * experts);
  });
  return mask;
}

// Scores experts: the products of inputs x [T, h] and keys [N, h] in float32.
Tensor scores_of(const Tensor& x, const Tensor& keys) { return at::linear(x.to(at::kFloat), keys); }

// Chooses experts as `choose` does, by the scores of inputs x [T, h] and keys [N, h].
Tensor route(const Tensor& x, const Tensor& keys, int64_t k, bool highest) {
  return choose(scores_of(x, keys), k, highest);
}

// Multiplies numbers by zero: what is not finite becomes NaN.
template <typename scalar_t>
INLINE void times_zero(scalar_t* to, const scalar_t* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = from[i] * scalar_t(0);
}

// The same for numbers of 16 bits, in integers, which compilers vectorise.
//
// exponent: bits that are all set if a number is not finite.
// nan: bits of NaN.
INLINE void times_zero_as_bits(void* to, const void* from, int64_t size, uint16_t exponent, uint16_t nan) {
  constexpr uint16_t kSign = 0x8000;
  const auto* numbers = static_cast<const uint16_t*>(from);
  auto* zeros = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < size; ++i) {
    const uint16_t signed_zero = numbers[i] & kSign;
    const bool is_finite = (numbers[i] & exponent) != exponent;
    zeros[i] = is_finite ? signed_zero : nan;
  }
}

template <>
INLINE void times_zero(at::BFloat16* to, const at::BFloat16* from, int64_t size) {
  times_zero_as_bits(to, from, size, /*exponent=*/0x7f80, /*nan=*/0x7fc0);
}

template <>
INLINE void times_zero(at::Half* to, const at::Half* from, int64_t size) {
  times_zero_as_bits(to, from, size, /*exponent=*/0x7c00, /*nan=*/0x7e00);
}

// Multiplies numbers by a scale. Most scales are 0 or 1, which need no multiplication.
template <typename scalar_t>
INLINE void multiply_by_scale(scalar_t* to, const scalar_t* from, int64_t size, scalar_t scale) {
  if (scale == 0) {
    times_zero(to, from, size);
  } else if (scale == 1) {
    std::copy_n(from, size, to);
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = from[i] * scale;
  }
}

// Multiplies the neurons of each token and expert by the expert's weight.
//
// hidden: neurons of each token, expert after expert [..., N * s], in float32, float64 or bfloat16.
// weights: experts' weights for each token [T, N]. A mask keeps the neurons of its experts.
//
// Returns the products in the shape and dtype of `hidden`.
Tensor scale_blocks(const Tensor& hidden, const Tensor& weights) {
  const Tensor neurons = hidden.contiguous();
  const Tensor scales = weights.to(hidden.scalar_type()).contiguous();
  Tensor out = at::empty_like(neurons);
  // a block has the neurons of one token and one expert
  const int64_t blocks = scales.numel();
  const int64_t size = neurons.numel() / std::max<int64_t>(blocks, 1);
  const int64_t blocks_per_task = at::internal::GRAIN_SIZE / std::max<int64_t>(size, 1) + 1;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, neurons.scalar_type(), "scale_blocks", [&] {
    const scalar_t* from = neurons.const_data_ptr<scalar_t>();
    const scalar_t* scale = scales.const_data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, blocks, blocks_per_task, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) multiply_by_scale(to + i * size, from + i * size, size, scale[i]);
    });
  });
  return out;
}

// Chooses experts as `route` does, and multiplies the neurons of the others by zero.
//
// hidden: neurons of each token, expert after expert [..., N * s], in a floating-point type.
// x: a row for each token [T, h].
// keys: a row for each expert [N, h], float32.
//
// Returns the products in the shape and dtype of `hidden`.
Tensor mask_neurons(const Tensor& hidden, const Tensor& x, const Tensor& keys, int64_t k, bool highest) {
  constexpr int64_t kNeuronsPerTask = 8192;
  const Tensor scores = scores_of(x, keys).contiguous();
  const Tensor neurons = hidden.contiguous();
  Tensor out = at::empty_like(neurons);
  const int64_t tokens = scores.size(0);
  const int64_t experts = scores.size(1);
  const int64_t size = neurons.numel() / std::max<int64_t>(tokens * experts, 1);
  const int64_t tokens_per_task = kNeuronsPerTask / std::max<int64_t>(experts * size, 1) + 1;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, neurons.scalar_type(), "mask_neurons", [&] {
    const float* token_scores = scores.const_data_ptr<float>();
    const scalar_t* from = neurons.const_data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, tokens, tokens_per_task, [&](int64_t begin, int64_t end) {
      Choice choice(experts, k, highest);
      const auto chosen = std::make_unique<bool[]>(experts);
      for (int64_t token = begin; token < end; ++token) {
        choice(chosen.get(), token_scores + token * experts);
        for (int64_t expert = 0; expert < experts; ++expert) {
          const int64_t block = (token * experts + expert) * size;
          const scalar_t scale = chosen[expert] ? 1 : 0;
          multiply_by_scale(to + block, from + block, size, scale);
        }
      }
    });
  });
  return out;
}

// The pairs of few tokens, sorted by expert, then token.
struct FewPairs {
  std::vector<int64_t> tokens;  // token number of each pair [P]
  std::vector<int64_t> starts;  // first pair of each expert, and P [N + 1]

  // Lists the pairs of a mask [T, N].
  explicit FewPairs(const Tensor& mask) : starts{0} {
    const int64_t num_tokens = mask.size(0);
    const int64_t experts = mask.size(1);
    const Tensor contiguous_mask = mask.contiguous();
    const bool* chosen = contiguous_mask.const_data_ptr<bool>();
    for (int64_t expert = 0; expert < experts; ++expert) {
      for (int64_t token = 0; token < num_tokens; ++token) {
        if (chosen[token * experts + expert]) tokens.push_back(token);
      }
      starts.push_back(tokens.size());
    }
  }

  int64_t size() const { return tokens.size(); }
  int64_t count(int64_t expert) const { return starts[expert + 1] - starts[expert]; }
};

// Calls f with a pointer to the numbers of a tensor: float, or uint16_t for bfloat16.
template <typename F>
void with_numbers(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kBFloat16) {
    f(static_cast<const uint16_t*>(tensor.const_data_ptr()));
  } else {
    f(tensor.const_data_ptr<float>());
  }
}

// Computes gather_mm for few tokens.
//
// x: a row for each token [T, h].
// mask: chosen experts [T, N], bool.
// w: weights [N, s, h], contiguous, in float32 or bfloat16.
// b: biases [N, s], or none.
//
// Returns the products [P, s], sorted by expert, then token: computed in float32, and rounded to the dtype of x.
Tensor few_gather_mm(const Tensor& x, const Tensor& mask, const Tensor& w, const std::optional<Tensor>& b) {
  const FewPairs pairs(mask);
  const int64_t experts = w.size(0);
  const int64_t size = w.size(1);
  const int64_t width = w.size(2);
  const Tensor inputs = x.to(at::kFloat).contiguous();
  const Tensor biases = b ? b->to(at::kFloat).contiguous() : Tensor();
  Tensor out = at::zeros({pairs.size(), size}, inputs.options());

  // the address of each pair's outputs [s] and inputs [h]
  std::vector<float*> to(pairs.size());
  std::vector<const float*> from(pairs.size());
  for (int64_t i = 0; i < pairs.size(); ++i) {
    to[i] = out.data_ptr<float>() + i * size;
    from[i] = inputs.const_data_ptr<float>() + pairs.tokens[i] * width;
  }
  with_numbers(w, [&](const auto* weights) {
    at::parallel_for(0, experts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t expert = begin; expert < end; ++expert) {
        const int64_t start = pairs.starts[expert];
        const int64_t count = pairs.count(expert);
        if (count == 0) continue;
        // the dot products are added to the bias
        if (b) repeat_row(to[start], biases.const_data_ptr<float>() + expert * size, count, size);
        const auto* expert_weights = weights + expert * size * width;
        few_tokens::dots_here(to.data() + start, from.data() + start, count, expert_weights, size, width);
      }
    });
  });
  return out.to(x.scalar_type());
}

// Computes scatter_mm for few tokens.
//
// a: a row for each pair [P, s], sorted by expert, then token.
// mask: chosen experts [T, N], bool.
// v: values [N, s, h], contiguous, in float32 or bfloat16.
//
// Returns the sums [T, h] in float32.
Tensor few_scatter_mm(const Tensor& a, const Tensor& mask, const Tensor& v) {
  const FewPairs pairs(mask);
  const int64_t tokens = mask.size(0);
  const int64_t experts = v.size(0);
  const int64_t size = v.size(1);
  const int64_t width = v.size(2);
  const Tensor neurons = a.to(at::kFloat).contiguous();
  Tensor out = at::zeros({tokens, width}, neurons.options());

  // the address of each pair's outputs [h], shared with other pairs of the token, and of its neurons [s]
  std::vector<float*> to(pairs.size());
  std::vector<const float*> from(pairs.size());
  for (int64_t i = 0; i < pairs.size(); ++i) {
    to[i] = out.data_ptr<float>() + pairs.tokens[i] * width;
    from[i] = neurons.const_data_ptr<float>() + i * size;
  }
  // each thread computes some columns of all outputs, so that each output has one writer
  const int64_t columns_per_task = width / at::get_num_threads() + 1;
  with_numbers(v, [&](const auto* values) {
    at::parallel_for(0, width, columns_per_task, [&](int64_t begin, int64_t end) {
      for (int64_t expert = 0; expert < experts; ++expert) {
        const int64_t start = pairs.starts[expert];
        const auto* expert_values = values + expert * size * width;
        few_tokens::add_here(to.data() + start, from.data() + start, pairs.count(expert), expert_values, size, width,
                             begin, end);
      }
    });
  });
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // none of them touches Python objects, so other Python threads may run meanwhile
  m.def("gather_mm", &gather_mm, py::call_guard<py::gil_scoped_release>());
  m.def("scatter_mm", &scatter_mm, py::call_guard<py::gil_scoped_release>());
  m.def("outer_mm", &outer_mm, py::call_guard<py::gil_scoped_release>());
  m.def("scale_blocks", &scale_blocks, py::call_guard<py::gil_scoped_release>());
  m.def("mask_neurons", &mask_neurons, py::call_guard<py::gil_scoped_release>());
  m.def("route", &route, py::call_guard<py::gil_scoped_release>());
  m.def("choose", &choose, py::call_guard<py::gil_scoped_release>());
  m.def("few_gather_mm", &few_gather_mm, py::call_guard<py::gil_scoped_release>());
  m.def("few_scatter_mm", &few_scatter_mm, py::call_guard<py::gil_scoped_release>());
}
