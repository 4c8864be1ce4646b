// The activations of family `semi24` on vectors.
#pragma once

#include "cpu/math.h"
#include "slkernels/semi24_gemm.h"

namespace slk::cpu::SLK_ISA {

// z Phi(z) = z erfc(-z / sqrt 2) / 2, with erfc's tail from Abramowitz and Stegun 7.1.26: at most 1e-7 |z| off.
SLK_INLINE V gelu(V z) {
  const V t = 1.f / (abs(z) * 0.231641888f + 1.f);  // 0.3275911 / sqrt 2
  V p = broadcast(0.5307027145f);
  p = p * t - 0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const V tail = p * t * exp(z * z * -0.5f);
  return z * ((VI)(z < 0.f) ? tail : 1.f - tail);
}

// NaN stays NaN.
SLK_INLINE V activate(Activation24 f, V z) {
  switch (f) {
    case Activation24::none:
      break;
    case Activation24::relu:
      return max(zero(), z);
    case Activation24::silu:
      return z / (exp(-z) + 1.f);
    case Activation24::gelu:
      return gelu(z);
    case Activation24::relu2:
      z = max(zero(), z);
      return z * z;
  }
  return z;
}

}  // namespace slk::cpu::SLK_ISA
