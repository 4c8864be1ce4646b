// CSR supports at the torch boundary.
#pragma once

#include "slkernels/sparse.h"
#include "torch/tensor.h"

namespace slk {

// Checks dtypes and shapes of (crow, col) for an [n, m] support, and, with `validate`, every index; returns the view
// that kernels take. Raises with the position of the first fault. crow and col must be contiguous.
Csr as_csr(const char* op, const Tensor& crow, const Tensor& col, int64_t n, int64_t m, bool validate);

// The products below run where their tensors are. Values have the activations' dtype.

// y (+)= x S^T for token-major x [T, m] and y [T, n].
void spmm_into(const Csr& s, const Tensor& values, const Tensor& x, const Tensor& y, bool accumulate);

// A CSR of S^T, with the tensors that own its arrays.
struct TransposedCsr {
  Tensor crow, row, values;
  Csr csr;
};
TransposedCsr transposed(const Csr& s, const Tensor& crow, const Tensor& values);

// dv = (dy^T x) at the support, in dy's dtype.
Tensor sddmm_at(const Csr& s, const Tensor& dy, const Tensor& x);

// W at the support; W = alpha B A + S + base (A and B null together).
Tensor gather_at(const Csr& s, const Tensor& w);
Tensor compose_weight(const Csr& s, const Tensor& values, const Tensor* A, const Tensor* B, double alpha,
                      const Tensor* base);

// Values as fp32 (a view if they are; fp64 stays), for CPU kernels that sum in fp32.
Tensor values_f32(const Tensor& values);

inline Matrix as_matrix(const Tensor& t) {
  return {t.mutable_data_ptr(), t.size(0), t.size(1), t.stride(0)};  // stride 0: one row, expanded
}

// A [rank, m], B [n, rank], dtypes like `like`.
void check_lowrank(const char* op, const Tensor& A, const Tensor& B, int64_t n, int64_t m, const char* like_name,
                   const Tensor& like);

#ifdef SLKERNELS_WITH_CUDA
namespace cuda {
void spmm_into(const Csr& s, const Tensor& values, const Tensor& x, const Tensor& y, bool accumulate);
TransposedCsr transposed(const Csr& s, const Tensor& crow, const Tensor& values);
Tensor sddmm_at(const Csr& s, const Tensor& dy, const Tensor& x);
Tensor gather_at(const Csr& s, const Tensor& w);
void scatter_add(const Csr& s, const Tensor& values, const Tensor& w);
}  // namespace cuda
#endif

}  // namespace slk
