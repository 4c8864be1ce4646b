// Element types in kernels: what a DType is in CUDA C++, what it is summed in, and 16-byte vectors of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "slkernels/launch.cuh"
#include "slkernels/types.h"

namespace slk::cuda {

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float widen(__half x) {
  return __half2float(x);
}
__device__ inline float widen(float x) {
  return x;
}
__device__ inline double widen(double x) {
  return x;
}

// To nearest even.
template <class T>
__device__ T narrow(Sum<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

// What a lane loads or stores at once.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// The sum over the warp, in every lane.
template <class T>
__device__ T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <class P>
using Pointee = std::remove_pointer_t<P>;

// f(pointer to the element type); the pointer is null. Not for fp64.
template <class F>
cudaError_t with_float_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((__nv_bfloat16*)nullptr);
    case DType::f16:
      return f((__half*)nullptr);
    case DType::f64:
      break;
  }
  return cudaErrorInvalidValue;
}
// The same, fp64 included.
template <class F>
cudaError_t with_type(DType dtype, F f) {
  return dtype == DType::f64 ? f((double*)nullptr) : with_float_type(dtype, f);
}

// f(pointer to the element type, the columns of s as what they are).
template <class F>
cudaError_t with_types(DType dtype, const Csr& s, F f) {
  return with_type(dtype, [&](auto* type) {
    return s.col_is_16 ? f(type, static_cast<const int16_t*>(s.col)) : f(type, static_cast<const int32_t*>(s.col));
  });
}

}  // namespace slk::cuda
