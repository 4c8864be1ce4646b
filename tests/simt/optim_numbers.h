// Numbers for the optimizer kernels' programs: reproducible, over many decades, with zeros.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "slkernels/types.h"

namespace numbers {

inline uint64_t mix(uint64_t x) {  // SplitMix64's output function
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
inline double uniform(uint64_t seed, uint64_t i) {
  return double(mix(mix(seed) + i) >> 11) * 0x1p-53;
}
// Both signs, magnitudes over `decades` decades below 1, one in fifty is zero.
inline std::vector<float> random(int64_t n, uint64_t seed, double decades) {
  std::vector<float> x(n);
  for (int64_t i = 0; i < n; ++i) {
    const double u = uniform(seed, 3 * i), v = uniform(seed, 3 * i + 1);
    x[i] = v < 0.02 ? 0.0f : float((2 * u - 1) * std::pow(10.0, -decades * uniform(seed, 3 * i + 2)));
  }
  return x;
}

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline bool same(float a, float b) {  // NaN is NaN
  return bits(a) == bits(b) || (a != a && b != b);
}

// An element of type `dtype` at p: bits of bf16 are the high half of fp32's; fp16 is left to the compiler.
inline void store(slk::DType dtype, void* p, int64_t i, float x) {
  switch (dtype) {
    case slk::DType::bf16: {
      const uint32_t u = bits(x);
      static_cast<uint16_t*>(p)[i] = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
      return;
    }
    case slk::DType::f16:
      static_cast<_Float16*>(p)[i] = _Float16(x);
      return;
    default:
      static_cast<float*>(p)[i] = x;
  }
}
inline float load(slk::DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case slk::DType::bf16:
      return from_bits(uint32_t(static_cast<const uint16_t*>(p)[i]) << 16);
    case slk::DType::f16:
      return float(static_cast<const _Float16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}
inline int bytes(slk::DType dtype) {
  return dtype == slk::DType::f32 ? 4 : 2;
}

}  // namespace numbers
