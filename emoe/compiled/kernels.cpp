// The three products of an FFN of experts for the chosen (token, expert) pairs: in float32 with product.h if the
// processor supports it, else with PyTorch. And for passes without gradient: the choice of experts, the masking of
// neurons, and two products for few tokens (few_tokens.h).
//
// Pairs are sorted by chunk of tokens, then expert, then token: those of chunk c and expert n are rows[i] for i from
// starts[c * N + n] to starts[c * N + n + 1] - 1. Chunks share no output row and experts share no weight, so each
// product runs in parallel without locks, and in the same order for the same number of chunks.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "few_tokens.h"
#include "product.h"

namespace {

using at::Tensor;

struct Pairs {
  Tensor rows;
  std::vector<int64_t> starts;
  int64_t chunks, experts;

  Pairs(const Tensor& rows, const Tensor& starts, int64_t experts)
      : rows(rows),
        starts(starts.data_ptr<int64_t>(), starts.data_ptr<int64_t>() + starts.numel()),
        chunks((starts.numel() - 1) / experts),
        experts(experts) {}

  int64_t start(int64_t c, int64_t n) const { return starts[c * experts + n]; }
  int64_t size(int64_t c, int64_t n) const { return starts[c * experts + n + 1] - start(c, n); }
  const int64_t* tokens(int64_t c, int64_t n) const { return rows.const_data_ptr<int64_t>() + start(c, n); }
  Tensor of(int64_t c, int64_t n) const { return rows.narrow(0, start(c, n), size(c, n)); }

  // Allocates memory for the rows of any block once: an allocation per block would cost page faults.
  Tensor buffer(const Tensor& like, int64_t width) const {
    int64_t longest = 0;
    for (size_t i = 1; i < starts.size(); ++i) longest = std::max(longest, starts[i] - starts[i - 1]);
    return at::empty({longest, width}, like.options());
  }

  // Calls f(chunk, expert, pairs, memory) for each non-empty block, chunks in parallel. A thread reuses its memory.
  template <typename F>
  void each_block(const F& f) const {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      Tensor memory;
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t n = 0; n < experts; ++n) {
          if (size(c, n)) f(c, n, size(c, n), memory);
        }
      }
    });
  }
};

// Copies rows of x to the start of a buffer.
Tensor gathered(Tensor& buffer, const Tensor& x, const Tensor& rows) {
  Tensor block = buffer.narrow(0, 0, rows.size(0));
  at::index_select_out(block, x, 0, rows);
  return block;
}

// Checks if product.h can multiply matrices with the dtype and layout of w [N, s, h].
bool reads(const Tensor& a, const Tensor& w) {
  return product::multiply && a.scalar_type() == at::kFloat && (w.stride(1) == 1 || w.stride(2) == 1);
}

// Multiplies x[token] by the expert's rows of w [N, s, h] and adds b [N, s]: [pairs, s].
Tensor gather_mm(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, const Tensor& rows,
                 const Tensor& starts) {
  const Pairs pairs(rows, starts, w.size(0));
  const int64_t size = w.size(1), width = w.size(2);
  Tensor out = at::empty({rows.size(0), size}, x.options());
  if (reads(x, w)) {
    const Tensor biases = b ? b->contiguous() : Tensor();
    pairs.each_block([&](int64_t c, int64_t n, int64_t count, Tensor&) {
      float* block = out.data_ptr<float>() + pairs.start(c, n) * size;
      for (int64_t i = 0; b && i < count; ++i) {
        std::copy_n(biases.const_data_ptr<float>() + n * size, size, block + i * size);
      }
      product::multiply({{block, nullptr, size, 1},
                         {x.const_data_ptr<float>(), pairs.tokens(c, n), width, 1},
                         {w.const_data_ptr<float>() + n * w.stride(0), nullptr, w.stride(2), w.stride(1)},
                         count, size, width, b.has_value()});
    });
    return out;
  }
  pairs.each_block([&](int64_t c, int64_t n, int64_t count, Tensor& memory) {
    if (!memory.defined()) memory = pairs.buffer(x, width);
    Tensor block = out.narrow(0, pairs.start(c, n), count);
    Tensor picked = gathered(memory, x, pairs.of(c, n));
    if (b) {
      at::addmm_out(block, b->select(0, n), picked, w.select(0, n).t());
    } else {
      at::mm_out(block, picked, w.select(0, n).t());
    }
  });
  return out;
}

template <typename sum_t, typename scalar_t>
void add_rows(Tensor& to, const Tensor& from, const int64_t* rows) {
  const int64_t width = to.size(1);
  for (int64_t i = 0; i < from.size(0); ++i) {
    sum_t* __restrict target = to.data_ptr<sum_t>() + rows[i] * width;
    const scalar_t* __restrict source = from.data_ptr<scalar_t>() + i * width;
    for (int64_t j = 0; j < width; ++j) target[j] += static_cast<sum_t>(source[j]);
  }
}

// Sums over pairs are in float32 (float64 for float64), whatever the dtype of the weights.
at::ScalarType sum_type(const Tensor& a) { return a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Sums a[pair] times the expert's w [N, s, h] over each token's pairs: [T, h].
Tensor scatter_mm(const Tensor& a, const Tensor& w, const Tensor& rows, const Tensor& starts, int64_t tokens) {
  const Pairs pairs(rows, starts, w.size(0));
  const int64_t size = w.size(1), width = w.size(2);
  Tensor out = at::zeros({tokens, width}, a.options().dtype(sum_type(a)));
  if (reads(a, w)) {
    pairs.each_block([&](int64_t c, int64_t n, int64_t count, Tensor&) {
      product::multiply({{out.data_ptr<float>(), pairs.tokens(c, n), width, 1},
                         {a.const_data_ptr<float>() + pairs.start(c, n) * size, nullptr, size, 1},
                         {w.const_data_ptr<float>() + n * w.stride(0), nullptr, w.stride(1), w.stride(2)},
                         count, width, size, true});
    });
    return out;
  }
  pairs.each_block([&](int64_t c, int64_t n, int64_t count, Tensor& memory) {
    if (!memory.defined()) memory = pairs.buffer(a, width);
    Tensor product = memory.narrow(0, 0, count);
    at::mm_out(product, a.narrow(0, pairs.start(c, n), count), w.select(0, n));
    if (a.scalar_type() == at::kDouble) {
      add_rows<double, double>(out, product, pairs.tokens(c, n));
    } else if (a.scalar_type() == at::kBFloat16) {
      add_rows<float, at::BFloat16>(out, product, pairs.tokens(c, n));
    } else {
      add_rows<float, float>(out, product, pairs.tokens(c, n));
    }
  });
  return out.to(a.scalar_type());
}

// Computes outer_mm with product.h.
void outer_mm_directly(const Tensor& a, const Tensor& x, const Pairs& pairs, Tensor& out) {
  const int64_t size = out.size(1), width = out.size(2);
  const bool by_neuron = out.stride(2) == 1;
  at::parallel_for(0, pairs.experts, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // one cache line longer than a row: rows would otherwise map to the same few cache sets
    const int64_t stride = by_neuron ? out.stride(1) : width + product::kLine;
    std::vector<float> sums(by_neuron ? 0 : size * stride);
    for (int64_t n = begin; n < end; ++n) {
      float* block = out.data_ptr<float>() + n * out.stride(0);
      float* to = by_neuron ? block : sums.data();
      bool add = false;
      for (int64_t c = 0; c < pairs.chunks; ++c) {
        if (pairs.size(c, n) == 0) continue;
        product::multiply({{to, nullptr, stride, 1},
                           {a.const_data_ptr<float>() + pairs.start(c, n) * size, nullptr, 1, size},
                           {x.const_data_ptr<float>(), pairs.tokens(c, n), width, 1},
                           size, width, pairs.size(c, n), add});
        add = true;
      }
      if (!add) out.select(0, n).zero_();
      if (add && !by_neuron) product::transpose(block, out.stride(2), to, stride, size, width);
    }
  });
}

// Sums a[pair]^T x[token] over each expert's pairs into out [N, s, h].
void outer_mm(const Tensor& a, const Tensor& x, const Tensor& rows, const Tensor& starts, Tensor out) {
  const Pairs pairs(rows, starts, out.size(0));
  if (reads(a, out)) return outer_mm_directly(a, x, pairs, out);
  at::parallel_for(0, pairs.experts, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor buffer = pairs.buffer(x, x.size(1));
    for (int64_t n = begin; n < end; ++n) {
      Tensor block = out.select(0, n);
      Tensor sum;  // of all chunks but the first
      bool first = true;
      for (int64_t c = 0; c < pairs.chunks; ++c) {
        if (pairs.size(c, n) == 0) continue;
        Tensor left = a.narrow(0, pairs.start(c, n), pairs.size(c, n)).t();
        Tensor picked = gathered(buffer, x, pairs.of(c, n));
        if (first) {
          at::mm_out(block, left, picked);
        } else if (block.scalar_type() == sum_type(a)) {
          block.addmm_(left, picked);
        } else {
          if (!sum.defined()) sum = block.to(sum_type(a));
          sum.add_(at::mm(left, picked));
        }
        first = false;
      }
      if (first) block.zero_();
      if (sum.defined()) block.copy_(sum);
    }
  });
}

// Marks each row's k highest of scores [T, N], or lowest; among equal scores, those of the lower index. NaN is infinite.
Tensor choose(const Tensor& scores, int64_t k, bool highest) {
  const int64_t rows = scores.size(0), size = scores.size(1);
  const Tensor values = scores.contiguous();
  Tensor mask = at::empty({rows, size}, scores.options().dtype(at::kBool));
  const float* from = values.const_data_ptr<float>();
  bool* to = mask.data_ptr<bool>();
  at::parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> ranked(size), sorted(size);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < size; ++i) {
        const float score = from[row * size + i];
        const float number = std::isnan(score) ? std::numeric_limits<float>::infinity() : score;
        ranked[i] = highest ? number : -number;
      }
      sorted = ranked;
      std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
      const float lowest = sorted[k - 1];
      int64_t equal = k;  // chosen experts with the lowest score
      for (int64_t i = 0; i < size; ++i) equal -= ranked[i] > lowest;
      for (int64_t i = 0; i < size; ++i) {
        const bool is_equal = ranked[i] == lowest;
        to[row * size + i] = ranked[i] > lowest || (is_equal && equal > 0);
        equal -= is_equal;
      }
    }
  });
  return mask;
}

// Chooses by the products of inputs [T, h] and keys [N, h] in float32.
Tensor route(const Tensor& x, const Tensor& keys, int64_t k, bool highest) {
  return choose(at::linear(x.to(at::kFloat), keys), k, highest);
}

// Multiplies by zero: what is not finite becomes NaN.
template <typename scalar_t>
void times_zero(scalar_t* to, const scalar_t* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = from[i] * scalar_t(0);
}

template <>
void times_zero(at::BFloat16* to, const at::BFloat16* from, int64_t size) {
  const auto* numbers = reinterpret_cast<const uint16_t*>(from);
  auto* zeros = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < size; ++i) {  // in integers, which compilers vectorise
    const uint16_t sign = numbers[i] & 0x8000, exponent = numbers[i] & 0x7f80;
    zeros[i] = exponent == 0x7f80 ? 0x7fc0 : sign;
  }
}

// Multiplies the blocks of neurons [..., d] by their experts' weights [T, N], or keeps those of a mask.
Tensor scale_blocks(const Tensor& hidden, const Tensor& weights) {
  const Tensor from = hidden.contiguous(), scales = weights.to(hidden.scalar_type()).contiguous();
  Tensor out = at::empty_like(from);
  const int64_t blocks = scales.numel(), size = from.numel() / std::max<int64_t>(blocks, 1);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, from.scalar_type(), "scale_blocks", [&] {
    const scalar_t *numbers = from.const_data_ptr<scalar_t>(), *scale = scales.const_data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, blocks, at::internal::GRAIN_SIZE / std::max<int64_t>(size, 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i * size;
        if (scale[i] == 0) {
          times_zero(to + start, numbers + start, size);
        } else if (scale[i] == 1) {
          std::copy_n(numbers + start, size, to + start);
        } else {
          for (int64_t j = start; j < start + size; ++j) to[j] = numbers[j] * scale[i];
        }
      }
    });
  });
  return out;
}

// The tokens [P] of each expert of a mask [T, N], and where each expert's begin.
struct Chosen {
  std::vector<int64_t> tokens, starts;

  explicit Chosen(const Tensor& mask) : starts{0} {
    const int64_t rows = mask.size(0), experts = mask.size(1);
    const Tensor dense = mask.contiguous();
    const bool* chosen = dense.const_data_ptr<bool>();
    for (int64_t n = 0; n < experts; ++n) {
      for (int64_t t = 0; t < rows; ++t) {
        if (chosen[t * experts + n]) tokens.push_back(t);
      }
      starts.push_back(tokens.size());
    }
  }

  int64_t count(int64_t n) const { return starts[n + 1] - starts[n]; }
};

// Calls f with a pointer to the numbers of a tensor in float32 or bfloat16.
template <typename F>
void with_numbers(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kBFloat16) {
    f(static_cast<const uint16_t*>(tensor.const_data_ptr()));
  } else {
    f(tensor.const_data_ptr<float>());
  }
}

// Multiplies x[token] by the chosen experts' rows of w [N, s, h] and adds b [N, s]: [P, s] by expert, rounded to x's dtype.
Tensor few_gather_mm(const Tensor& x, const Tensor& mask, const Tensor& w, const std::optional<Tensor>& b) {
  const Chosen chosen(mask);
  const int64_t size = w.size(1), width = w.size(2), pairs = chosen.tokens.size();
  const Tensor inputs = x.to(at::kFloat).contiguous();
  const Tensor biases = b ? b->to(at::kFloat).contiguous() : Tensor();
  Tensor out = at::zeros({pairs, size}, inputs.options());
  std::vector<float*> to(pairs);
  std::vector<const float*> from(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    to[i] = out.data_ptr<float>() + i * size;
    from[i] = inputs.const_data_ptr<float>() + chosen.tokens[i] * width;
  }
  with_numbers(w, [&](const auto* weights) {
    at::parallel_for(0, w.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t start = chosen.starts[n];
        for (int64_t i = start; b && i < start + chosen.count(n); ++i) {
          std::copy_n(biases.const_data_ptr<float>() + n * size, size, to[i]);
        }
        few_tokens::dots_here(to.data() + start, from.data() + start, chosen.count(n), weights + n * size * width, size,
                              width);
      }
    });
  });
  return out.to(x.scalar_type());
}

// Sums a[pair] times the chosen expert's v [N, s, h] over each token's pairs: [T, h] in float32.
Tensor few_scatter_mm(const Tensor& a, const Tensor& mask, const Tensor& v) {
  const Chosen chosen(mask);
  const int64_t size = v.size(1), width = v.size(2), pairs = chosen.tokens.size();
  const Tensor neurons = a.to(at::kFloat).contiguous();
  Tensor out = at::zeros({mask.size(0), width}, neurons.options());
  std::vector<float*> to(pairs);
  std::vector<const float*> from(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    to[i] = out.data_ptr<float>() + chosen.tokens[i] * width;
    from[i] = neurons.const_data_ptr<float>() + i * size;
  }
  // threads share the columns, so that each output has one writer
  with_numbers(v, [&](const auto* values) {
    at::parallel_for(0, width, width / at::get_num_threads() + 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < v.size(0); ++n) {
        const int64_t start = chosen.starts[n];
        few_tokens::add_here(to.data() + start, from.data() + start, chosen.count(n), values + n * size * width, size,
                             width, begin, end);
      }
    });
  });
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("gather_mm", &gather_mm, py::call_guard<py::gil_scoped_release>());
  m.def("scatter_mm", &scatter_mm, py::call_guard<py::gil_scoped_release>());
  m.def("outer_mm", &outer_mm, py::call_guard<py::gil_scoped_release>());
  m.def("scale_blocks", &scale_blocks, py::call_guard<py::gil_scoped_release>());
  m.def("route", &route, py::call_guard<py::gil_scoped_release>());
  m.def("choose", &choose, py::call_guard<py::gil_scoped_release>());
  m.def("few_gather_mm", &few_gather_mm, py::call_guard<py::gil_scoped_release>());
  m.def("few_scatter_mm", &few_scatter_mm, py::call_guard<py::gil_scoped_release>());
}
