// SwiGLU, element by element. Contract: slkernels/lowrank.h. Bound by memory: 6 bytes an element of a 16-bit type
// forward, 10 backward; a thread's 16-byte accesses keep 3 of them in flight.
#include "cuda/types.cuh"
#include "slkernels/lowrank.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float exponential(float x) {
  return expf(x);
}
__device__ double exponential(double x) {
  return exp(x);
}
template <class S>
__device__ S sigmoid(S x) {
  return S(1) / (S(1) + exponential(-x));
}

// The elements [i, i + kSize) of `count`; one by one at the end, and where addresses are not multiples of 16 bytes.
template <class T>
__device__ Vector<T> load_vector(const T* p, int64_t i, int64_t count, bool aligned) {
  if (aligned && i + Vector<T>::kSize <= count) return *reinterpret_cast<const Vector<T>*>(p + i);
  Vector<T> v;
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; ++e) v.at[e] = i + e < count ? p[i + e] : narrow<T>(0);
  return v;
}
template <class T>
__device__ void store_vector(T* p, const Vector<T>& v, int64_t i, int64_t count, bool aligned) {
  if (aligned && i + Vector<T>::kSize <= count) {
    *reinterpret_cast<Vector<T>*>(p + i) = v;
  } else {
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e)
      if (i + e < count) p[i + e] = v.at[e];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const T* gate, const T* up, T* h, int64_t count, bool aligned) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Vector<T>::kSize;
  if (i >= count) return;
  Vector<T> g = load_vector(gate, i, count, aligned);
  const Vector<T> u = load_vector(up, i, count, aligned);
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; ++e) {
    const Sum<T> x = widen(g.at[e]);
    g.at[e] = narrow<T>(x * sigmoid(x) * widen(u.at[e]));
  }
  store_vector(h, g, i, count, aligned);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const T* dh, T* gate, T* up, int64_t count, bool aligned) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Vector<T>::kSize;
  if (i >= count) return;
  const Vector<T> d = load_vector(dh, i, count, aligned);
  Vector<T> g = load_vector(gate, i, count, aligned), u = load_vector(up, i, count, aligned);
#pragma unroll
  for (int e = 0; e < Vector<T>::kSize; ++e) {
    const Sum<T> x = widen(g.at[e]), incoming = widen(d.at[e]), s = sigmoid(x), silu = x * s;
    g.at[e] = narrow<T>(incoming * widen(u.at[e]) * (s + silu * (1 - s)));
    u.at[e] = narrow<T>(incoming * silu);
  }
  store_vector(gate, g, i, count, aligned);
  store_vector(up, u, i, count, aligned);
}

bool on_16_bytes(const void* a, const void* b, const void* c) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c)) % 16 == 0;
}
template <class T>
unsigned blocks_for(int64_t count) {
  return unsigned(ceil_div(count, kThreads * Vector<T>::kSize));
}

}  // namespace

cudaError_t launch_swiglu(DType dtype, const void* gate, const void* up, void* h, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(swiglu_kernel<T>, blocks_for<T>(count), kThreads, 0, stream, static_cast<const T*>(gate),
                  static_cast<const T*>(up), static_cast<T*>(h), count, on_16_bytes(gate, up, h));
  });
}

cudaError_t launch_swiglu_backward(DType dtype, const void* dh, void* gate, void* up, int64_t count,
                                   cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(swiglu_backward_kernel<T>, blocks_for<T>(count), kThreads, 0, stream, static_cast<const T*>(dh),
                  static_cast<T*>(gate), static_cast<T*>(up), count, on_16_bytes(dh, gate, up));
  });
}

}  // namespace slk::cuda
