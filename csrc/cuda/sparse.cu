// Products with a sparse S [n, m] on CUDA cores: y = x S^T, and (dy^T x) at the support. For decode and for low
// densities: with random positions every multiply-add needs another operand from L1 or L2, so at large T and more than
// a percent or two of density a dense product on tensor cores is faster (docs/paths.md), and `sl` takes that.
//
//   to_features   out[j][t] = x[t, j], zeros for t >= T. Block: a tile of 32 tokens x 32 features through shared
//   memory. spmm          y[t, i] (+)= sum_k values[k] xt[col(k)][t]. Block: kRows rows of S x one tile of tokens; a
//   warp takes a
//                 row, a lane one 16-byte vector of tokens, so that a nonzero is one coalesced read of 512 bytes a
//                 warp. The tile of y turns around in shared memory: y is token-major.
//   sddmm         out[k] = sum_t dyt[row(k)][t] xt[col(k)][t]. Block: a row of S, whose dyt stays in L1; a warp takes a
//                 nonzero and runs along the tokens.
//   spmm_few      the same as spmm for at most 8 tokens, x token-major. A warp takes a row of S, a lane a nonzero.
//
// Sums are in fp32 (fp64 for f64), in an order fixed by the shapes.
#include "cuda/types.cuh"
#include "slkernels/sparse.h"

namespace slk::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSide = 32;  // of a tile of to_features
// Rows of S a block: a token's run of y is then 64 bytes of a 16-bit type, two whole sectors.
constexpr int kRows = 32;

// ---- to_features ----------------------------------------------------------------------------------------------------

template <class T>
__global__ void to_features_kernel(const T* x, int64_t tokens, int64_t features, int64_t ld, T* out) {
  __shared__ T tile[kSide][kSide + 1];  // + 1: columns are read without bank conflicts
  const int64_t padded = padded_tokens(tokens);
  const int64_t t0 = int64_t(blockIdx.x) * kSide, j0 = int64_t(blockIdx.y) * kSide;
  const int across = threadIdx.x % kSide, down = threadIdx.x / kSide;
  for (int r = down; r < kSide; r += kThreads / kSide) {
    const int64_t t = t0 + r, j = j0 + across;
    tile[r][across] = t < tokens && j < features ? x[t * ld + j] : narrow<T>(0);
  }
  __syncthreads();
  for (int r = down; r < kSide; r += kThreads / kSide) {
    const int64_t t = t0 + across, j = j0 + r;
    if (t < padded && j < features) out[j * padded + t] = tile[across][r];
  }
}

// ---- spmm -----------------------------------------------------------------------------------------------------------

// acc += values[k] xt[col(k)][t...] over the nonzeros [begin, end) of a row, 32 of which the warp reads at once.
template <class T, class Col>
__device__ void add_row(const Col* col, const T* values, int begin, int end, const T* xt, int64_t padded, int64_t t,
                        Sum<T> (&acc)[Vector<T>::kSize]) {
  const int lane = threadIdx.x % 32;
  for (int first = begin; first < end; first += 32) {
    const int count = end - first < 32 ? end - first : 32;
    int column = 0;
    Sum<T> value = 0;
    if (lane < count) {
      column = col[first + lane];
      value = widen(values[first + lane]);
    }
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      const int64_t j = __shfl_sync(kAllLanes, column, k);
      const Sum<T> v = __shfl_sync(kAllLanes, value, k);
      if (t < padded) {
        const Vector<T> x = *reinterpret_cast<const Vector<T>*>(xt + j * padded + t);
#pragma unroll
        for (int e = 0; e < Vector<T>::kSize; ++e) acc[e] += v * widen(x.at[e]);
      }
    }
  }
}

template <class T, class Col>
__global__ void __launch_bounds__(kThreads)
    spmm_kernel(const int32_t* crow, const Col* col, const T* values, int64_t n, const T* xt, int64_t tokens, T* y,
                int64_t ld, bool accumulate) {
  constexpr int kVec = Vector<T>::kSize, kTile = 32 * kVec;
  __shared__ Sum<T> tile[kRows][kTile + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = int64_t(blockIdx.x) * kRows, t0 = int64_t(blockIdx.y) * kTile, padded = padded_tokens(tokens);
  for (int r = warp; r < kRows; r += kWarps) {
    Sum<T> acc[kVec] = {};
    const int64_t i = row0 + r;
    if (i < n) add_row(col, values, crow[i], crow[i + 1], xt, padded, t0 + lane * kVec, acc);
#pragma unroll
    for (int e = 0; e < kVec; ++e) tile[r][lane * kVec + e] = acc[e];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kTile; at += kThreads) {
    const int r = at % kRows, t = at / kRows;
    if (row0 + r >= n || t0 + t >= tokens) continue;
    T* out = y + (t0 + t) * ld + row0 + r;
    *out = narrow<T>(accumulate ? widen(*out) + tile[r][t] : tile[r][t]);
  }
}

template <class T, class Col, int kTokens>
__global__ void spmm_few_kernel(const int32_t* crow, const Col* col, const T* values, int64_t n, const T* x,
                                int64_t ldx, int tokens, T* y, int64_t ldy, bool accumulate) {
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  Sum<T> acc[kTokens] = {};
  const int end = crow[i + 1];
  for (int k = crow[i] + lane; k < end; k += 32) {
    const int64_t j = col[k];
    const Sum<T> v = widen(values[k]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < tokens) acc[t] += v * widen(x[t * ldx + j]);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const Sum<T> sum = warp_sum(acc[t]);
    if (lane == t && t < tokens) {
      T* out = y + t * ldy + i;
      *out = narrow<T>(accumulate ? widen(*out) + sum : sum);
    }
  }
}

// ---- sddmm ----------------------------------------------------------------------------------------------------------

template <class T, class Col>
__global__ void __launch_bounds__(kThreads)
    sddmm_kernel(const int32_t* crow, const Col* col, const T* dyt, const T* xt, int64_t tokens, T* out) {
  constexpr int kVec = Vector<T>::kSize;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t i = blockIdx.x, padded = padded_tokens(tokens);
  const T* a = dyt + i * padded;
  const int end = crow[i + 1];
  for (int k = crow[i] + warp; k < end; k += kWarps) {
    const T* b = xt + int64_t(col[k]) * padded;
    Sum<T> acc[kVec] = {};  // a chain a component: independent, and shorter sums
    for (int64_t t = lane * kVec; t < padded; t += 32 * kVec) {
      const Vector<T> u = *reinterpret_cast<const Vector<T>*>(a + t);
      const Vector<T> v = *reinterpret_cast<const Vector<T>*>(b + t);
#pragma unroll
      for (int e = 0; e < kVec; ++e) acc[e] += widen(u.at[e]) * widen(v.at[e]);
    }
    Sum<T> sum = 0;
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum += acc[e];
    sum = warp_sum(sum);
    if (lane == 0) out[k] = narrow<T>(sum);
  }
}

}  // namespace

cudaError_t launch_to_features(DType dtype, const Matrix& x, void* xt, cudaStream_t stream) {
  if (x.rows == 0 || x.cols == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const dim3 grid(unsigned(ceil_div(x.rows, kSide)), unsigned(ceil_div(x.cols, kSide)));
    return launch(to_features_kernel<T>, grid, kThreads, 0, stream, static_cast<const T*>(x.data), x.rows, x.cols, x.ld,
                  static_cast<T*>(xt));
  });
}

cudaError_t launch_spmm(DType dtype, const Csr& s, const void* values, const void* xt, const Matrix& y, bool accumulate,
                        cudaStream_t stream) {
  if (y.rows == 0 || s.n == 0) return cudaSuccess;
  return with_types(dtype, s, [&](auto* type, auto* col) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    const dim3 grid(unsigned(ceil_div(s.n, kRows)), unsigned(ceil_div(y.rows, 32 * Vector<T>::kSize)));
    return launch(spmm_kernel<T, Col>, grid, kThreads, 0, stream, s.crow, col, static_cast<const T*>(values), s.n,
                  static_cast<const T*>(xt), y.rows, static_cast<T*>(y.data), y.ld, accumulate);
  });
}

cudaError_t launch_spmm_few(DType dtype, const Csr& s, const void* values, const Matrix& x, const Matrix& y,
                            bool accumulate, cudaStream_t stream) {
  if (y.rows > kFewTokens) return cudaErrorInvalidValue;
  if (y.rows == 0 || s.n == 0) return cudaSuccess;
  return with_types(dtype, s, [&](auto* type, auto* col) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    const auto kernel = y.rows == 1   ? spmm_few_kernel<T, Col, 1>
                        : y.rows <= 4 ? spmm_few_kernel<T, Col, 4>
                                      : spmm_few_kernel<T, Col, int(kFewTokens)>;
    return launch(kernel, unsigned(ceil_div(s.n, kWarps)), kThreads, 0, stream, s.crow, col,
                  static_cast<const T*>(values), s.n, static_cast<const T*>(x.data), x.ld, int(y.rows),
                  static_cast<T*>(y.data), y.ld, accumulate);
  });
}

cudaError_t launch_sddmm(DType dtype, const Csr& s, const void* dyt, const void* xt, int64_t tokens, void* out,
                         cudaStream_t stream) {
  if (s.nnz == 0) return cudaSuccess;
  return with_types(dtype, s, [&](auto* type, auto* col) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Col = std::remove_const_t<std::remove_pointer_t<decltype(col)>>;
    return launch(sddmm_kernel<T, Col>, unsigned(s.n), kThreads, 0, stream, s.crow, col, static_cast<const T*>(dyt),
                  static_cast<const T*>(xt), tokens, static_cast<T*>(out));
  });
}

}  // namespace slk::cuda
