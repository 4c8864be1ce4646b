// What the programs of family `project` share: drawing, rounding and comparing numbers of the three element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "slkernels/optim_codec.cuh"
#include "slkernels/project_cuda.h"

namespace project_check {

inline std::set<std::string> failures;

inline void expect(bool ok, const char* what) {
  if (!ok) failures.insert(what);
}
inline int finish(const char* program) {
  for (const std::string& what : failures) std::printf("FAIL %s\n", what.c_str());
  if (failures.empty()) std::printf("%s: ok\n", program);
  return failures.empty() ? 0 : 1;
}

inline slk::DType type_of(float) {
  return slk::DType::f32;
}
inline slk::DType type_of(__nv_bfloat16) {
  return slk::DType::bf16;
}
inline slk::DType type_of(__half) {
  return slk::DType::f16;
}
inline float number(float x) {
  return x;
}
inline float number(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
inline float number(__half x) {
  return __half2float(x);
}

// To nearest even, or stochastically: written apart from the kernels, in double.
inline float rounded(float x, bool, uint32_t, float) {
  return x;
}
inline __nv_bfloat16 rounded(float x, bool stochastic, uint32_t random, __nv_bfloat16) {
  return stochastic ? __ushort_as_bfloat16(slk::codec::round_bf16_stochastic(x, random)) : __float2bfloat16_rn(x);
}
inline __half rounded(float x, bool stochastic, uint32_t random, __half) {
  if (!stochastic) return __float2half_rn(x);
  int e;
  std::frexp(double(x), &e);
  const bool tiny = std::fabs(x) < 0x1p-14f;
  const double last = std::ldexp(1.0, (tiny ? -14 : e - 1) - 10);
  if (tiny) {
    const double y = x / last, down = std::floor(y);
    return __float2half_rn(float((down + (y - down > random / 65536.0)) * last));
  }
  const double y = std::floor(std::fabs(double(x)) / last + (random >> 3) / 8192.0) * last;
  return __float2half_rn(float(x < 0 ? -y : y));
}

template <class T>
std::vector<T> draw(int64_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = rounded(normal(generator) * (i % 7 ? 1.0f : 1e-5f), false, 0, T());
  return out;
}

template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace project_check
