// The three products of an FFN of experts for the chosen (token, expert) pairs: in float32 with product.h if the
// processor supports it, else with PyTorch.
//
// Pairs are sorted by chunk of tokens, then expert, then token: those of chunk c and expert n are rows[i] for i from
// starts[c * N + n] to starts[c * N + n + 1] - 1. Chunks share no output row and experts share no weight, so each
// product runs in parallel without locks, and in the same order for the same number of chunks.
#include <ATen/Parallel.h>
#include <torch/extension.h>

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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("gather_mm", &gather_mm, py::call_guard<py::gil_scoped_release>());
  m.def("scatter_mm", &scatter_mm, py::call_guard<py::gil_scoped_release>());
  m.def("outer_mm", &outer_mm, py::call_guard<py::gil_scoped_release>());
}
