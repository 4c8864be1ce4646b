// Arithmetic that C++ has no word for: byte permutes with sign replication, and quotients and roots that are correctly
// rounded over a range, without the test for operands outside it.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_arith.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace slk::ptx {

// prmt.b32 (PTX ISA, "prmt"): byte i of the result is byte `selector >> 4 i & 7` of b:a, or, where bit 3 of that nibble
// is set, eight copies of its sign. (__byte_perm is documented for three bits a nibble.)
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// a / b rounded to nearest even for |a| in {0} and [2^-100, 2^100], |b| in [2^-100, 2^100], and a quotient in [2^-126,
// 2^127]: what div.rn does where it does not branch (a zero gives +0).
__device__ inline float divide_in_range(float a, float b) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = __fmaf_rn(r, __fmaf_rn(-b, r, 1.0f), r);
  const float q = __fmaf_rn(a, r, 0.0f);
  return __fmaf_rn(r, __fmaf_rn(-b, q, a), q);
}

// 2^48 sqrt(a), rounded to nearest even, for a = 0 and every a in [2^-149, 2^30]: what sqrt.rn does where it does not
// branch, on 2^96 a, which is a normal number. Adding 2^-80 changes none of those but 0, whose approximate root is then
// a number.
__device__ inline float root_times_2_48(float a) {
  const float x = __fmul_rn(a, 0x1p96f);
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__fmaf_rn(a, 0x1p96f, 0x1p-80f)));
  const float s = __fmul_rn(x, y);
  return __fmaf_rn(__fmaf_rn(-s, s, x), __fmul_rn(0.5f, y), s);
}

}  // namespace slk::ptx
#endif
