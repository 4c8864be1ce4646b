// Arithmetic instructions that C++ has no word for. PTX ISA, "Floating Point Instructions".
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace slk::ptx {

// ex2.approx.ftz.f32: 2^x with 2 ulp; -inf gives 0, and so does what would be subnormal.
__device__ inline float exp2_approx(float x) {
#ifdef SLK_SIMT
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// rcp.approx.ftz.f32: 1 / x with 1 ulp; of an infinity 0.
__device__ inline float reciprocal_approx(float x) {
#ifdef SLK_SIMT
  return 1.f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// No instruction: x, of which the compiler knows nothing. What is computed from it inside a loop stays there, instead
// of taking a register throughout.
__device__ inline int opaque(int x) {
#ifndef SLK_SIMT
  asm volatile("" : "+r"(x));
#endif
  return x;
}

}  // namespace slk::ptx
