// Family `sl` on the device: y = x (alpha B A + S)^T + bias for the few tokens of decoding.
//
//   z[t, q] = sum_j A[q, j] x[t, j]                                          fp32, [T, r]
//   y[t, i] = alpha sum_q B[i, q] z[t, q] + sum_k values[k] x[t, col(k)] + bias[i]
//
// Reads every weight once: 2 r (m + n) + 4 nnz bytes in bf16 where a dense W has 2 n m. Sums in fp32 (fp64 for f64), in
// an order fixed by the shapes; one rounding of y.
#pragma once

#include "slkernels/sparse.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
namespace slk::cuda {

constexpr int64_t kDecodeTokens = 8;

// Rows of x, A, B are contiguous. z is scratch, [T, r] in fp32 (fp64 for f64). bias may be null.
struct SlDecodeArgs {
  Matrix x, y;  // [T, m], [T, n]; T <= kDecodeTokens
  const void *A, *B, *values, *bias;
  int64_t rank, lda, ldb;
  double alpha;
  void* z;
};
cudaError_t launch_sl_decode(DType, const SlDecodeArgs&, const Csr&, cudaStream_t);

}  // namespace slk::cuda
#endif
