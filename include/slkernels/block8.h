// Family `block8`: products with a matrix S [n, m] made of 8x8 blocks at random places.
//
//   spmm     y[T, n]  = x[T, m] S^T
//   spmm_t   dx[T, m] = dy[T, n] S               (spmm with the transposed list of blocks)
//   sddmm    dv[blocks, 8, 8] = (dy^T x) at the blocks
//
// The list of blocks is a CSR over the grid of ceil(n / 8) x ceil(m / 8) blocks (a slk::Csr in units of blocks); values
// [blocks, 8, 8], row-major within a block: values[k, i, j] = S[8 row(k) + i, 8 col(k) + j]. The right and the bottom
// edge may cut blocks: entries beyond S must be finite, take no part, and have gradient zero.
//
// A value of S is used once a token in any format; what 8x8 blocks buy is that a load of x serves 8 rows of S and a
// value's neighbours are at hand, so that vector units and tensor cores run on operands from registers. Sums are in
// fp32 (fp64 for f64), in an order that depends on the shapes only.
#pragma once

#include "slkernels/sparse.h"

namespace slk {

// S, or S^T read through a transposed list: block k of the list is values[order[k]], transposed. order null: S itself.
struct Blocks {
  Csr grid;
  const int32_t* order;
};

namespace cpu {

struct Block8Kernels {
  // y[t0 + t, i] = sum_j S[i, j] xt[j, t] for the block rows in `rows`; xt as in SparseKernels, with zeros up to a
  // multiple of 8 features. y.cols cuts the last block row.
  void (*spmm_panel)(DType y_dtype, const Blocks&, const float* values, const float* xt, int panel, Range rows,
                     const Matrix& y, int64_t t0);
  // acc[k][i][j] += sum_t dyt[8 row(k) + i, t] xt[8 col(k) + j, t] for the block rows in `rows`; both padded as above.
  void (*sddmm_panel)(const Csr& grid, const float* dyt, const float* xt, int panel, Range rows, float* acc);

  // The same products in fp64, unblocked: they exist for gradient checks.
  void (*spmm_f64)(const Blocks&, const double* values, const Matrix& x, const Matrix& y, Range tokens);
  void (*sddmm_f64)(const Csr& grid, const Matrix& dy, const Matrix& x, Range rows, double* out);
};
const Block8Kernels& block8_kernels();

}  // namespace cpu

#if defined(SLKERNELS_WITH_CUDA) || defined(__CUDACC__)
namespace cuda {

// bf16 and fp16, on tensor cores; cudaErrorInvalidValue for other types.
//
// spmm keeps a tile of x, 16, 32 or 64 tokens with as many features as fit into `shared_bytes` of shared memory a
// block, and streams S past it. Where not all features fit, it takes them in slices, whose sums wait in `partial`.
// order: of `Blocks`. x [T, m], y [T, n] with contiguous rows.
struct Block8Plan {
  int tokens;      // a tile: 16, 32 or 64
  int64_t slice;   // features a slice, a multiple of 64
  int64_t slices;  // 1: no partial sums
  int64_t parts;   // of the block rows, each with a tile of x of its own
  int64_t partial(int64_t tokens_in_all, int64_t block_rows) const {  // floats
    return slices == 1 ? 0 : round_up(tokens_in_all, 16) * block_rows * 8;
  }
};
Block8Plan plan_block8(int64_t tokens, const Csr& grid, int64_t shared_bytes, int multiprocessors);
cudaError_t launch_block8_spmm(DType, const Block8Plan&, const Blocks&, const void* values, const Matrix& x,
                               const Matrix& y, float* partial, cudaStream_t);

// dyt [n, padded_tokens(T)] and xt [m, padded_tokens(T)]: feature-major, as launch_to_features leaves them.
cudaError_t launch_block8_sddmm(DType, const Csr& grid, int64_t n, int64_t m, const void* dyt, const void* xt,
                                int64_t tokens, void* out, cudaStream_t);

// order[k] = k: with launch_transpose_csr, whose values it takes the place of, the order of a transposed list.
cudaError_t launch_block8_order(int32_t* order, int64_t blocks, cudaStream_t);

}  // namespace cuda
#endif
}  // namespace slk
