// What neurons make of their pre-activations: PyTorch's activations, computed in float32 as PyTorch does.
#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "few_rows.h"

namespace neurons {

using few_rows::Bits;
using few_rows::Floats;
using few_rows::kLanes;
using few_rows::loaded;

enum class Activation { kReLU, kSiLU, kGELU, kGELUTanh };

INLINE Activation activation_called(const std::string& name) {
  if (name == "relu") return Activation::kReLU;
  if (name == "silu") return Activation::kSiLU;
  if (name == "gelu") return Activation::kGELU;
  if (name == "gelu_tanh") return Activation::kGELUTanh;
  TORCH_CHECK(false, "no activation called ", name);
}

// e^x to the last bit or two: 2^n for the nearest whole n, times a polynomial of what is left, which is at most ln(2) / 2
INLINE Floats exp(Floats x) {
  constexpr float kWhole = 12582912;  // a number that is added to it is rounded to a whole one, which its last bits then are
  constexpr float kMost = 88.5f, kLeast = -87;
  const Floats within = x > kMost ? Floats{} + kMost : x < kLeast ? Floats{} + kLeast : x;
  const Floats shifted = within * static_cast<float>(M_LOG2E) + kWhole, n = shifted - kWhole;
  const Floats rest = within - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts, the first of which n times is exact
  Floats sum = rest * (1 / 5040.f) + 1 / 720.f;
  for (float next : {1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1.f, 1.f}) sum = sum * rest + next;
  const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + (127u << 23);
  return x > kMost ? Floats{} + INFINITY : sum * reinterpret_cast<Floats>(power);
}

INLINE Floats activated(Activation kind, Floats z) {
  switch (kind) {
    case Activation::kReLU:
      return z < 0 ? Floats{} : z;
    case Activation::kSiLU:
      return z / (1 + exp(-z));
    case Activation::kGELUTanh:  // as (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u))
      return z / (1 + exp(static_cast<float>(-M_SQRT2 * M_2_SQRTPI) * (z + 0.044715f * z * z * z)));
    case Activation::kGELU:
      break;
  }
  for (int lane = 0; lane < kLanes; ++lane) z[lane] *= 0.5f * (1 + std::erf(z[lane] * static_cast<float>(M_SQRT1_2)));
  return z;
}

// In place, of a whole number of vectors.
FOR_EACH_PROCESSOR void activate(Activation kind, float* z, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats found = activated(kind, loaded<Floats>(z + i));
    std::memcpy(z + i, &found, sizeof(found));
  }
}

}  // namespace neurons
