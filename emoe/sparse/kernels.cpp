// The three products of an FFN of experts, restricted to the chosen (token, expert) pairs, and the two of a few tokens.
//
// Pairs are sorted by chunk of tokens, then expert, then token: the pairs of chunk c and expert n are
// rows[starts[c * N + n]] ... rows[starts[c * N + n + 1] - 1]. Chunks of tokens share no output row and experts share no
// weight, so each product runs in parallel without locks, and in the same order for the same number of chunks.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <cstring>
#include <numeric>

// Compiled for several processors; the one at hand is asked for when the library is loaded, which may be kept where others read it.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE inline __attribute__((always_inline))

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

  int64_t start(int64_t chunk, int64_t expert) const { return starts[chunk * experts + expert]; }
  int64_t size(int64_t chunk, int64_t expert) const { return starts[chunk * experts + expert + 1] - start(chunk, expert); }
  Tensor of(int64_t chunk, int64_t expert) const { return rows.narrow(0, start(chunk, expert), size(chunk, expert)); }

  // Memory for the rows of any block, asked for once: a request a block would cost page faults.
  Tensor buffer(const Tensor& like, int64_t width) const {
    int64_t longest = 0;
    for (size_t i = 1; i < starts.size(); ++i) longest = std::max(longest, starts[i] - starts[i - 1]);
    return at::empty({longest, width}, like.options());
  }
};

// The rows of x, in the first places of a buffer.
Tensor gathered(Tensor& buffer, const Tensor& x, const Tensor& rows) {
  Tensor place = buffer.narrow(0, 0, rows.size(0));
  at::index_select_out(place, x, 0, rows);
  return place;
}

// [pairs, s]: x[token] times the expert's rows of w [N, s, h], plus b [N, s]
Tensor gather_mm(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, const Tensor& rows, const Tensor& starts) {
  const Pairs pairs(rows, starts, w.size(0));
  Tensor out = at::empty({rows.size(0), w.size(1)}, x.options());
  at::parallel_for(0, pairs.chunks, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor buffer = pairs.buffer(x, x.size(1));
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t n = 0; n < pairs.experts; ++n) {
        if (pairs.size(c, n) == 0) continue;
        Tensor part = out.narrow(0, pairs.start(c, n), pairs.size(c, n));
        Tensor picked = gathered(buffer, x, pairs.of(c, n));
        if (b.has_value()) {
          at::addmm_out(part, b->select(0, n), picked, w.select(0, n).t());
        } else {
          at::mm_out(part, picked, w.select(0, n).t());
        }
      }
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

// Sums over pairs are kept in float32 (float64 for float64) whatever the weights are.
at::ScalarType sum_type(const Tensor& a) { return a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// [T, h]: sum over a token's pairs of a[pair] times the expert's w [N, s, h]
Tensor scatter_mm(const Tensor& a, const Tensor& w, const Tensor& rows, const Tensor& starts, int64_t tokens) {
  const Pairs pairs(rows, starts, w.size(0));
  const int64_t width = w.size(2);
  Tensor out = at::zeros({tokens, width}, a.options().dtype(sum_type(a)));
  at::parallel_for(0, pairs.chunks, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor buffer = pairs.buffer(a, width);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t n = 0; n < pairs.experts; ++n) {
        const int64_t count = pairs.size(c, n);
        if (count == 0) continue;
        Tensor product = buffer.narrow(0, 0, count);
        at::mm_out(product, a.narrow(0, pairs.start(c, n), count), w.select(0, n));
        const int64_t* tokens_of = rows.data_ptr<int64_t>() + pairs.start(c, n);
        if (a.scalar_type() == at::kDouble) {
          add_rows<double, double>(out, product, tokens_of);
        } else if (a.scalar_type() == at::kBFloat16) {
          add_rows<float, at::BFloat16>(out, product, tokens_of);
        } else {
          add_rows<float, float>(out, product, tokens_of);
        }
      }
    }
  });
  return out.to(a.scalar_type());
}

// Sum over an expert's pairs of a[pair]^T x[token], written into out [N, s, h]
void outer_mm(const Tensor& a, const Tensor& x, const Tensor& rows, const Tensor& starts, Tensor out) {
  const Pairs pairs(rows, starts, out.size(0));
  at::parallel_for(0, pairs.experts, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor buffer = pairs.buffer(x, x.size(1));
    for (int64_t n = begin; n < end; ++n) {
      Tensor part = out.select(0, n);
      Tensor sum;  // of all chunks but the first
      bool first = true;
      for (int64_t c = 0; c < pairs.chunks; ++c) {
        if (pairs.size(c, n) == 0) continue;
        Tensor left = a.narrow(0, pairs.start(c, n), pairs.size(c, n)).t();
        Tensor picked = gathered(buffer, x, pairs.of(c, n));
        if (first) {
          at::mm_out(part, left, picked);
        } else if (part.scalar_type() == sum_type(a)) {
          part.addmm_(left, picked);
        } else {
          if (!sum.defined()) sum = part.to(sum_type(a));
          sum.add_(at::mm(left, picked));
        }
        first = false;
      }
      if (first) part.zero_();
      if (sum.defined()) part.copy_(sum);
    }
  });
}

// A few tokens: bound by memory, so weights are read where they lie, once, and only those of the chosen experts.

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

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("gather_mm", &gather_mm, py::call_guard<py::gil_scoped_release>());
  m.def("scatter_mm", &scatter_mm, py::call_guard<py::gil_scoped_release>());
  m.def("outer_mm", &outer_mm, py::call_guard<py::gil_scoped_release>());
  m.def("rows_mm", &rows_mm, py::call_guard<py::gil_scoped_release>());
  m.def("chosen_rows_mm", &chosen_rows_mm, py::call_guard<py::gil_scoped_release>());
  m.def("largest", &largest);
  m.def("values_mm", &values_mm, py::call_guard<py::gil_scoped_release>());
}
