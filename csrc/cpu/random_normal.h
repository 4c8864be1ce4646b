// Vectors of lanes for slkernels/random_normal.cuh.
#pragma once

#include "cpu/simd.h"
#include "slkernels/random_normal.cuh"

namespace slk::cpu::SLK_ISA {

struct VectorWords {
  using F = V;
  using U = VU;
  using I = VI;
  static SLK_INLINE U word(uint32_t x) { return U{} + x; }
  static SLK_INLINE F number(float x) { return broadcast(x); }
  static SLK_INLINE void multiply(U a, uint32_t b, U& high, U& low) {
    high = multiply_high(a, b);
    low = a * b;
  }
  static SLK_INLINE F from_bits(U u) { return (F)u; }
  static SLK_INLINE U to_bits(F x) { return (U)x; }
  static SLK_INLINE I as_int(U u) { return (I)u; }
  static SLK_INLINE U as_word(I i) { return (U)i; }
  static SLK_INLINE U select(U mask, U a, U b) { return (mask & a) | (~mask & b); }
  static SLK_INLINE F to_float(I i) { return SLK_ISA::to_float(i); }
  static SLK_INLINE F mul(F a, F b) { return a * b; }
  static SLK_INLINE F add(F a, F b) { return a + b; }
  static SLK_INLINE F sqrt(F a) { return SLK_ISA::sqrt(a); }
  static SLK_INLINE F fma(F a, F b, F c) {
#if defined(__FMA__)
    return SLK_ISA::fma(a, b, c);
#else
    F r;  // simd.h's rounds twice once in 2^29; normals are to be the same bits everywhere
    for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#endif
  }
};

SLK_INLINE VU lane_numbers() {
  VU v;
  for (int i = 0; i < kLanes; ++i) v[i] = uint32_t(i);
  return v;
}
// The low and high words of first, first + 1, ..., one a lane.
SLK_INLINE void counters(uint64_t first, VU& low, VU& high) {
  const VU base = VectorWords::word(uint32_t(first));
  low = base + lane_numbers();
  high = VectorWords::word(uint32_t(first >> 32)) - (VU)(low < base);  // all ones where the low word wrapped
}

}  // namespace slk::cpu::SLK_ISA
