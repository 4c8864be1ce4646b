// Elementary functions on vectors. Polynomials are minimax fits in fp32; tests/test_attention.py holds them to their
// bounds through the ops that use them.
#pragma once

#include "cpu/simd.h"

namespace slk::cpu::SLK_ISA {

// e^x = 2^n e^f with n the integer next to x / ln 2, at most 1 ulp off; 0 below e^-87 (AVX-512: down to subnormals),
// infinity above the largest float, NaN for NaN.
SLK_INLINE V exp(V x) {
  constexpr float kMagic = 0x1.8p23f;  // x + kMagic rounds x to an integer
#if defined(__AVX512F__)
  x = max(broadcast(-110.f), x);  // keeps -inf out of the subtraction; max returns a NaN in its second operand
#else
  const VI tiny = x < -87.f, huge = x > 88.722839f;
  x = max(broadcast(-87.f), x);
#endif
  const V shifted = x * 1.44269504f + kMagic, n = shifted - kMagic;
  const V f = (x - n * 0.693359375f) + n * 2.12194442e-4f;  // ln 2 in two parts: n times the first is exact
  V y = broadcast(1.38367398e-3f);
  y = y * f + 8.37489869e-3f;
  y = y * f + 4.16682325e-2f;
  y = y * f + 1.66664198e-1f;
  y = y * f + 4.99999911e-1f;
  y = y * f + 1.f;
  y = y * f + 1.f;
#if defined(__AVX512F__)
  return (V)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const V scaled = (V)((VI)y + (VI)((VU)shifted << 23));  // the low bits of `shifted` are n
  const V ordered = (VI)(x != x) ? y : scaled;
  return tiny ? zero() : huge ? broadcast(__builtin_inff()) : ordered;
#endif
}

// tanh x, at most 4 ulp off: an odd polynomial near zero, where (1 - t) / (1 + t) with t = exp(-2 |x|) would cancel.
SLK_INLINE V tanh(V x) {
  const V z = x * x;
  V small = broadcast(2.2933667e-3f);
  small = small * z - 8.3446074e-3f;
  small = small * z + 2.1769173e-2f;
  small = small * z - 5.3959302e-2f;
  small = small * z + 1.3333304e-1f;
  small = small * z - 3.3333334e-1f;
  small = x + x * z * small;
  const V t = exp(abs(x) * -2.f);
  const V large = (1.f - t) / (1.f + t);
  const V signed_large = (V)((VI)large | ((VI)x & INT32_MIN));
  return (VI)(abs(x) < 0.625f) ? small : signed_large;
}

}  // namespace slk::cpu::SLK_ISA
