// Decoding with W = alpha B A + S, contract: slkernels/sl.h. Two launches of one shape of kernel: z = A x, then y; a
// barrier of the whole grid inside one launch would need every block resident at once, and costs as much as a launch.
//
// A block computes 8 rows of the output for up to 8 tokens. Its 8 warps share out the row's elements, 32 lanes x 16
// bytes at a time, so that the 8 rows' loads of a warp, 4 KB, are all in flight, and a load of x serves 8 rows. Then
// the warps meet in shared memory, where each output is summed over them in order. S: a warp takes one of the 8 rows, a
// lane an entry.
//
// Why 8 rows: rank 1024 then gives 128 blocks, one wave on 132 multiprocessors; and L1 reads (8 + T) / 8 bytes of x and
// weights together for a byte of weights.
#include "cuda/types.cuh"
#include "slkernels/sl.h"

namespace slk::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 8;
static_assert(kRows == kWarps, "a warp takes a row of S");

// Elements [j, j + N) of a row, whose address is a multiple of 16 bytes if `aligned`; zeros behind the row's end.
template <int N, class X>
__device__ void load_run(const X* row, int64_t j, int64_t columns, bool aligned, X (&to)[N]) {
  constexpr int kSize = Vector<X>::kSize;
  static_assert(N % kSize == 0, "whole vectors");
  if (aligned && j + N <= columns) {
#pragma unroll
    for (int first = 0; first < N; first += kSize) {
      const Vector<X> v = *reinterpret_cast<const Vector<X>*>(row + j + first);
#pragma unroll
      for (int e = 0; e < kSize; ++e) to[first + e] = v.at[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = j + e < columns ? row[j + e] : narrow<X>(0);
  }
}

// Row-major [rows, columns]; `aligned`: rows start at multiples of 16 bytes.
template <class X>
struct Rows {
  const X* base;
  int64_t rows, columns, ld;
  bool aligned;
};
template <class X>
Rows<X> rows_of(const void* base, int64_t rows, int64_t columns, int64_t ld) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && ld % Vector<X>::kSize == 0;
  return {static_cast<const X*>(base), rows, columns, ld, aligned};
}

// acc[r][t] += w[row0 + r, :] x[t, :] over this warp's share of the columns.
template <int kTokens, class T, class X>
__device__ void multiply_rows(const Rows<T>& w, int64_t row0, const Rows<X>& x, Sum<T> (&acc)[kRows][kTokens]) {
  constexpr int kVec = Vector<T>::kSize;
  for (int64_t j = int64_t(threadIdx.x) * kVec; j < w.columns; j += kThreads * kVec) {
    T v[kRows][kVec];
#pragma unroll
    for (int r = 0; r < kRows; ++r)  // rows that are not there read the last one, and are not stored
      load_run(w.base + (row0 + r < w.rows ? row0 + r : w.rows - 1) * w.ld, j, w.columns, w.aligned, v[r]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= x.rows) break;
      X run[kVec];
      load_run(x.base + t * x.ld, j, x.columns, x.aligned, run);
#pragma unroll
      for (int e = 0; e < kVec; ++e)
#pragma unroll
        for (int r = 0; r < kRows; ++r) acc[r][t] += widen(v[r][e]) * Sum<T>(widen(run[e]));
    }
  }
}

// The sum over lanes and warps of acc[r][t], in the thread r * kTokens + t.
template <int kTokens, class S>
__device__ S block_sum(S (&acc)[kRows][kTokens], S (&shared)[kWarps][kRows * kTokens]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const S sum = warp_sum(acc[r][t]);
      if (lane == 0) shared[warp][r * kTokens + t] = sum;
    }
  __syncthreads();
  S total = 0;
  if (threadIdx.x < kRows * kTokens)
    for (int w = 0; w < kWarps; ++w) total += shared[w][threadIdx.x];
  return total;
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads) project_kernel(Rows<T> A, Rows<T> x, Sum<T>* z) {
  __shared__ Sum<T> shared[kWarps][kRows * kTokens];
  const int64_t row0 = int64_t(blockIdx.x) * kRows;
  Sum<T> acc[kRows][kTokens] = {};
  multiply_rows<kTokens>(A, row0, x, acc);
  const Sum<T> total = block_sum(acc, shared);
  const int r = threadIdx.x / kTokens, t = threadIdx.x % kTokens;
  if (r < kRows && row0 + r < A.rows && t < x.rows) z[t * A.rows + row0 + r] = total;
}

template <class T>
struct SparseRows {
  const int32_t* crow;
  const void* col;
  bool col_is_16;  // asked at every entry, the same way by every thread: nothing beside the wait for the entry
  const T* values;
  __device__ int64_t column(int k) const {
    return col_is_16 ? static_cast<const int16_t*>(col)[k] : static_cast<const int32_t*>(col)[k];
  }
};

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads) output_kernel(Rows<T> B, Rows<Sum<T>> z, Sum<T> alpha, SparseRows<T> s,
                                                          Rows<T> x, const T* bias, T* y, int64_t ldy) {
  __shared__ Sum<T> shared[kWarps][kRows * kTokens], sparse[kRows][kTokens];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = int64_t(blockIdx.x) * kRows, mine = row0 + warp;
  Sum<T> sum[kTokens] = {};
  if (mine < B.rows) {
    const int end = s.crow[mine + 1];
    for (int k = s.crow[mine] + lane; k < end; k += 32) {
      const int64_t j = s.column(k);
      const Sum<T> v = widen(s.values[k]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        if (t < x.rows) sum[t] += v * widen(x.base[t * x.ld + j]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const Sum<T> total = warp_sum(sum[t]);
    if (lane == 0) sparse[warp][t] = total;
  }
  Sum<T> acc[kRows][kTokens] = {};
  multiply_rows<kTokens>(B, row0, z, acc);
  const Sum<T> total = block_sum(acc, shared);  // its barrier covers `sparse` too
  const int r = threadIdx.x / kTokens, t = threadIdx.x % kTokens;
  if (r >= kRows || row0 + r >= B.rows || t >= x.rows) return;
  const Sum<T> offset = bias ? Sum<T>(widen(bias[row0 + r])) : Sum<T>(0);
  y[t * ldy + row0 + r] = narrow<T>(alpha * total + sparse[r][t] + offset);
}

template <class T, int kTokens>
cudaError_t run(const SlDecodeArgs& a, const Csr& s, cudaStream_t stream) {
  const int64_t tokens = a.x.rows;
  auto* z = static_cast<Sum<T>*>(a.z);
  const Rows<T> A = rows_of<T>(a.A, a.rank, s.m, a.lda), B = rows_of<T>(a.B, s.n, a.rank, a.ldb);
  const Rows<T> x = rows_of<T>(a.x.data, tokens, s.m, a.x.ld);
  const cudaError_t error =
      launch(project_kernel<T, kTokens>, unsigned(ceil_div(a.rank, kRows)), kThreads, 0, stream, A, x, z);
  if (error != cudaSuccess) return error;
  const SparseRows<T> sparse = {s.crow, s.col, s.col_is_16, static_cast<const T*>(a.values)};
  return launch(output_kernel<T, kTokens>, unsigned(ceil_div(s.n, kRows)), kThreads, 0, stream, B,
                rows_of<Sum<T>>(z, tokens, a.rank, a.rank), Sum<T>(a.alpha), sparse, x, static_cast<const T*>(a.bias),
                static_cast<T*>(a.y.data), a.y.ld);
}

}  // namespace

cudaError_t launch_sl_decode(DType dtype, const SlDecodeArgs& a, const Csr& s, cudaStream_t stream) {
  if (a.x.rows > kDecodeTokens || a.rank < 1) return cudaErrorInvalidValue;
  if (a.x.rows == 0 || s.n == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kMost = int(kDecodeTokens);
    if constexpr (std::is_same_v<T, double>) {
      return run<T, kMost>(a, s, stream);  // fp64 is for gradient checks: one will do
    } else {
      const auto chosen = a.x.rows == 1 ? run<T, 1> : a.x.rows <= 4 ? run<T, 4> : run<T, kMost>;
      return chosen(a, s, stream);
    }
  });
}

}  // namespace slk::cuda
