// Family `gemm`: C[m, n] = A[m, k] B[n, k]^T on tensor cores: bf16 in, sums in fp32, one rounding to bf16.
//
// The plain product that the other families' tensor-core kernels grow from. Dense models are cuBLAS' business; what
// is here is written to be read first: one file an architecture, each stage of its pipeline named.
#pragma once

#include "slkernels/types.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>

namespace slk::cuda {

// Row-major bf16 matrices; lda, ldb, ldc are the distances of rows in elements (>= k, k, n).
// m, n, k >= 0 and below 2^31; k = 0 gives C = 0. Rows start at multiples of 16 bytes: a, b, c are 16-byte aligned and
// lda, ldb, ldc multiples of 8. Nothing is read beyond column k of A and B, nothing is written beyond column n of C.
struct GemmArgs {
  const void* a;
  const void* b;
  void* c;
  int64_t m, n, k, lda, ldb, ldc;
};

// What every launcher returns before it launches anything.
inline cudaError_t check_gemm_args(const GemmArgs& g) {
  const auto fits = [](int64_t size, int64_t ld, int64_t row) { return size >= 0 && size <= INT32_MAX && ld >= row; };
  if (!fits(g.m, g.lda, g.k) || !fits(g.n, g.ldb, g.k) || !fits(g.k, g.ldc, g.n)) return cudaErrorInvalidValue;
  const auto unaligned = [](const void* p, int64_t ld) { return reinterpret_cast<uintptr_t>(p) % 16 || ld % 8; };
  if (unaligned(g.a, g.lda) || unaligned(g.b, g.ldb) || unaligned(g.c, g.ldc)) return cudaErrorMisalignedAddress;
  return cudaSuccess;
}

// Asynchronous on `stream`. Deterministic: an element of C is summed in one block, over k ascending.
cudaError_t launch_gemm_sm80(const GemmArgs&, cudaStream_t stream);  // cp.async, ldmatrix, mma.sync: sm_80 and newer
cudaError_t launch_gemm_sm90(const GemmArgs&, cudaStream_t stream);  // TMA, mbarrier, wgmma: sm_90a

}  // namespace slk::cuda
#endif
