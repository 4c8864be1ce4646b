// W at the support, and W += S: the sparse half of `compose` and of its backward, next to cuBLAS's dense half.
//
//   gather       out[k] = W[row(k), col(k)]
//   scatter_add  W[row(k), col(k)] += values[k], one rounding of the fp32 sum (fp64 for f64)
//
// A warp takes a row of S, a lane every 32nd of its nonzeros: columns are sorted, so lanes next to each other touch the
// same or neighbouring sectors. Positions are unique, so nothing is atomic and the bits are the same every time.
#include "cuda/types.cuh"
#include "slkernels/sparse.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// f(k, address of W at nonzero k) for the nonzeros of this warp's row.
template <class T, class Col, class F>
__device__ void for_nonzeros(const int32_t* crow, const Col* col, int64_t n, T* w, int64_t ld, F f) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  const int end = crow[i + 1];
  for (int k = crow[i] + int(threadIdx.x % 32); k < end; k += 32) f(k, w + i * ld + col[k]);
}

template <class T, class Col>
__global__ void gather_kernel(const int32_t* crow, const Col* col, int64_t n, const T* w, int64_t ld, T* out) {
  for_nonzeros(crow, col, n, w, ld, [&](int k, const T* at) { out[k] = *at; });
}

template <class T, class Col>
__global__ void scatter_add_kernel(const int32_t* crow, const Col* col, int64_t n, const T* values, T* w, int64_t ld) {
  for_nonzeros(crow, col, n, w, ld, [&](int k, T* at) { *at = narrow<T>(widen(*at) + widen(values[k])); });
}

}  // namespace

cudaError_t launch_gather(DType dtype, const Csr& s, const void* w, int64_t ld, void* out, cudaStream_t stream) {
  if (s.nnz == 0) return cudaSuccess;
  return with_types(dtype, s, [&](auto* type, auto* col) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    return launch(gather_kernel<T, Col>, unsigned(ceil_div(s.n, kWarps)), kThreads, 0, stream, s.crow, col, s.n,
                  static_cast<const T*>(w), ld, static_cast<T*>(out));
  });
}

cudaError_t launch_scatter_add(DType dtype, const Csr& s, const void* values, void* w, int64_t ld,
                               cudaStream_t stream) {
  if (s.nnz == 0) return cudaSuccess;
  return with_types(dtype, s, [&](auto* type, auto* col) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    return launch(scatter_add_kernel<T, Col>, unsigned(ceil_div(s.n, kWarps)), kThreads, 0, stream, s.crow, col, s.n,
                  static_cast<const T*>(values), static_cast<T*>(w), ld);
  });
}

}  // namespace slk::cuda
