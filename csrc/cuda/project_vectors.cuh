// What the kernels of family `project` share: eight neighbouring elements as fp32, their random bits, their rounding.
#pragma once

#include "cuda/types.cuh"
#include "slkernels/optim_codec.cuh"
#include "slkernels/project_cuda.h"

namespace slk::cuda {

constexpr int kEight = 8;  // elements a thread holds: 16 bytes of a 16-bit type, and one draw of RoundingBits
static_assert(kEight == RoundingBits::kElements);

__device__ inline float as_float(float x) {
  return x;
}
__device__ inline float as_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float as_float(__half x) {
  return __half2float(x);
}
template <class T>
__device__ inline T as_type(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Eight {
  T at[kEight];
};

template <class T>
__device__ inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Eight<T>) == 0;
}

// The first `count` of eight elements at p; absent ones are `absent`.
template <class T>
__device__ inline Eight<T> load8(const T* p, int count, T absent) {
  Eight<T> x;
  if (count == kEight && is_aligned(p)) return *reinterpret_cast<const Eight<T>*>(p);
#pragma unroll
  for (int k = 0; k < kEight; ++k) x.at[k] = k < count ? p[k] : absent;
  return x;
}
template <class T>
__device__ inline void store8(T* p, const Eight<T>& x, int count) {
  if (count == kEight && is_aligned(p)) {
    *reinterpret_cast<Eight<T>*>(p) = x;
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k)
    if (k < count) p[k] = x.at[k];
}
template <class T>
__device__ inline void load_floats(const T* p, int count, float (&x)[kEight]) {
  const Eight<T> v = load8(p, count, as_type<T>(0.0f));
#pragma unroll
  for (int k = 0; k < kEight; ++k) x[k] = as_float(v.at[k]);
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// halves[k] = halves[k + kShift] if `shifted`. Indices are known at compile time: the array stays in registers.
template <int kShift>
__device__ inline void shift_down(uint32_t (&halves)[2 * kEight], bool shifted) {
#pragma unroll
  for (int k = 0; k + kShift < 2 * kEight; ++k) halves[k] = shifted ? halves[k + kShift] : halves[k];
}

// The 16 bits of elements first .. first + 7 of tensor 0: of one draw, or two where they do not begin one.
__device__ inline void random8(const RoundingBits& bits, int64_t first, uint32_t (&out)[kEight]) {
  const int64_t group = first / kEight;
  const int skip = int(first % kEight);
  const Philox low = bits.draw(0, group), high = skip ? bits.draw(0, group + 1) : low;
  uint32_t halves[2 * kEight];
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    halves[k] = low.word[k / 2] >> (k % 2 * 16) & 0xffffu;
    halves[kEight + k] = high.word[k / 2] >> (k % 2 * 16) & 0xffffu;
  }
  shift_down<4>(halves, skip & 4);
  shift_down<2>(halves, skip & 2);
  shift_down<1>(halves, skip & 1);
#pragma unroll
  for (int k = 0; k < kEight; ++k) out[k] = halves[k];
}

__device__ inline float round_stochastic(float x, uint32_t, float) {
  return x;
}
__device__ inline __nv_bfloat16 round_stochastic(float x, uint32_t random, __nv_bfloat16) {
  return __ushort_as_bfloat16(codec::round_bf16_stochastic(x, random));
}
__device__ inline __half round_stochastic(float x, uint32_t random, __half) {
  const uint32_t u = codec::bits_of(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return __float2half_rn(x);
  if ((u & 0x7fffffffu) < 0x38800000u) {  // below 2^-14: multiples of 2^-24
    const float scaled = x * 0x1p24f, down = floorf(scaled);
    const float up = codec::subtract(scaled, down) > float(random) * 0x1p-16f ? 1.0f : 0.0f;
    return __float2half_rn((down + up) * 0x1p-24f);
  }
  return __float2half_rn(codec::float_of((u + (random >> 3)) & 0xffffe000u));
}

// ---- updates --------------------------------------------------------------------------------------------------------

// x[count] += step T + step f G for neighbours in a row. TT, TG: their types.
template <class TT, class TG>
__device__ inline void add_terms(const UpdateOperands& o, float step, int64_t row, int64_t column, int count,
                                 float (&x)[kEight]) {
  float v[kEight];
  if (o.t) {
    load_floats(static_cast<const TT*>(o.t) + (row - o.t_row) * o.ldt + column, count, v);
#pragma unroll
    for (int k = 0; k < kEight; ++k) x[k] = codec::fused(step, v[k], x[k]);
  }
  if (!o.g) return;
  load_floats(static_cast<const TG*>(o.g) + row * o.ldg + column, count, v);
  const float one = o.factor_of == FactorOf::column ? 0.0f : o.factor[o.factor_of == FactorOf::row ? row : 0];
#pragma unroll
  for (int k = 0; k < kEight; ++k) {
    const float factor = o.factor_of == FactorOf::column ? (k < count ? o.factor[column + k] : 0.0f) : one;
    x[k] = codec::fused(codec::multiply(step, factor), v[k], x[k]);
  }
}

}  // namespace slk::cuda
