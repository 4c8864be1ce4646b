// Family `sparse`: products with a sparse matrix S [n, m] on a fixed random support (CSR).
//
//   spmm     y[T, n]  (+)= x[T, m] S^T
//   spmm_t   dx[T, m] (+)= dy[T, n] S            (spmm with the transposed CSR)
//   sddmm    dv[nnz]  = (dy^T x) at the support: dv[k] = sum_t dy[t, row(k)] x[t, col(k)]
//   gather   values[nnz] = W at the support;     scatter-add  W[n, m] += S
//
// Activations are token-major: element (t, j) of x is x[t * ld + j]. Sums are in fp32 (fp64 for f64), in an order that
// depends on the shapes only, so that results do not depend on the number of threads.
#pragma once

#include "slkernels/gemm.h"
#include "slkernels/random_support.cuh"
#include "slkernels/types.h"

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace slk {

// Where check_support found the first fault of a CSR support, and which.
struct SupportFault {
  enum Kind { none, crow_start, crow_end, crow_decreasing, col_range, col_unsorted, col_duplicate } kind = none;
  int64_t row = -1, position = -1, got = 0;
};

struct Matrix {  // token-major activations of the type that goes with it
  void* data;
  int64_t rows, cols, ld;
};

namespace cpu {

using slk::Matrix;

// The kernels work on panels of `panel` tokens (16, 32 or 64), transposed to xt[col][panel] in fp32: one broadcast of
// a value of S then feeds panel/lanes FMAs whose other operand is a run of aligned loads.
struct SparseKernels {
  // xt[j * panel + t] = x[t0 + t, j] for j in `cols`; zero where t0 + t >= x.rows.
  void (*pack_panel)(DType, const Matrix& x, int64_t t0, int panel, Range cols, float* xt);

  // y[t0 + t, i] (+)= sum_k values[k] xt[col(k), t] for the rows i of S in `rows`.
  void (*spmm_panel)(DType y_dtype, const Csr&, const float* values, const float* xt, int panel, Range rows,
                     const Matrix& y, int64_t t0, bool accumulate);

  // One token: y[i] (+)= sum_k values[k] x[col(k)].
  void (*spmv)(DType y_dtype, const Csr&, const float* values, const float* x, Range rows, void* y, bool accumulate);

  // acc[k] += sum_t dyt[row(k), t] xt[col(k), t] for the rows of S in `rows`.
  void (*sddmm_panel)(const Csr&, const float* dyt, const float* xt, int panel, Range rows, float* acc);

  // The same products in fp64, unblocked: they exist for gradient checks.
  void (*spmm_f64)(const Csr&, const double* values, const Matrix& x, const Matrix& y, Range tokens, bool accumulate);
  void (*sddmm_f64)(const Csr&, const Matrix& dy, const Matrix& x, Range rows, double* out);

  // out[k] = W[row(k), col(k)]; W[row(k), col(k)] += values[k]. W is [n, m] with leading dimension ld.
  void (*gather)(DType, const Csr&, const void* w, int64_t ld, Range rows, void* out);
  void (*scatter_add)(DType, const Csr&, const void* values, void* w, int64_t ld, Range rows);

  // Elementwise conversions between fp32 and `dtype`.
  void (*to_f32)(DType, const void* in, float* out, Range);
  void (*from_f32)(DType, const float* in, void* out, Range);
};
const SparseKernels& sparse_kernels();

SupportFault check_support(const Csr&);

// CSR of S^T: crow_t [m + 1], row_t [nnz] (int16 when n <= 32768, else int32), and values_t[k] = values[perm(k)].
template <class Value>
void transpose_csr(const Csr&, const Value* values, int32_t* crow_t, void* row_t, Value* values_t);

// The CSR of a sampled support, in O(nnz) time and 8 bytes a sample of scratch: crow [n + 1], col [count].
// `scratch` has room for `count` int64. Steps: `sample` (parallel over samples), `bucket`, `sort` (parallel over rows).
void sample_support(const SupportSampler&, Range samples, int64_t* scratch);
template <class Col>
void bucket_support(const SupportSampler&, const int64_t* scratch, int32_t* crow, Col* col);
template <class Col>
void sort_support(const SupportSampler&, const int32_t* crow, Col* col, Range rows);

// Expands the CSR of 8x8 blocks into the CSR of an [n, m] matrix.
template <class BlockCol, class Col>
void expand_blocks(const int32_t* block_crow, const BlockCol* block_col, int64_t n, int64_t m, int32_t* crow, Col* col);

}  // namespace cpu

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
namespace cuda {

// The same CSR on the device: crow [n + 1], col [count]; `scratch` is n + count int32. Bit-equal to the CPU's.
cudaError_t launch_random_support(const SupportSampler&, int32_t* crow, void* col, bool col_is_16, int32_t* scratch,
                                  cudaStream_t);
cudaError_t launch_expand_blocks(const int32_t* block_crow, const void* block_col, bool block_col_is_16, int64_t n,
                                 int64_t m, int32_t* crow, void* col, bool col_is_16, cudaStream_t);

// All tensors have the given type; values too. Sums in fp32 (fp64 for f64), in an order that depends on shapes only.
//
// Many tokens: the products read activations feature-major, xt[j][t] = x[t, j], with `padded_tokens(T)` tokens a
// feature and zeros behind the last one: a nonzero of S then reads runs of 16 bytes a lane.
constexpr int64_t kTokenPad = 8;  // 16 bytes of the narrowest type
constexpr int64_t padded_tokens(int64_t tokens) {
  return round_up(tokens, kTokenPad);
}
cudaError_t launch_to_features(DType, const Matrix& x, void* xt, cudaStream_t);
cudaError_t launch_spmm(DType, const Csr&, const void* values, const void* xt, const Matrix& y, bool accumulate,
                        cudaStream_t);
cudaError_t launch_sddmm(DType, const Csr&, const void* dyt, const void* xt, int64_t tokens, void* out, cudaStream_t);

// Few tokens (decode): reads x as it is.
constexpr int64_t kFewTokens = 8;
cudaError_t launch_spmm_few(DType, const Csr&, const void* values, const Matrix& x, const Matrix& y, bool accumulate,
                            cudaStream_t);

// out[k] = W[row(k), col(k)]; W[row(k), col(k)] += values[k]. W is [n, m] with leading dimension ld.
cudaError_t launch_gather(DType, const Csr&, const void* w, int64_t ld, void* out, cudaStream_t);
cudaError_t launch_scatter_add(DType, const Csr&, const void* values, void* w, int64_t ld, cudaStream_t);

// W = alpha B A + S in one pass, bf16: c = W [n, m], a = B [n, r], b = A^T [m, r] as slkernels/gemm.h wants its
// operands; values bf16. One fp32 sum and one rounding an element.
cudaError_t launch_compose_sm80(const GemmArgs&, const Csr&, const void* values, float alpha, cudaStream_t);
cudaError_t launch_compose_sm90(const GemmArgs&, const Csr&, const void* values, float alpha, cudaStream_t);

// CSR of S^T, as cpu::transpose_csr: row_t is int16 when n <= 32768, else int32. `scratch` has transpose_scratch(s)
// int32.
int64_t transpose_scratch(const Csr&);
cudaError_t launch_transpose_csr(DType, const Csr&, const void* values, int32_t* crow_t, void* row_t, void* values_t,
                                 int32_t* scratch, cudaStream_t);

}  // namespace cuda
#endif
}  // namespace slk
