// CSR supports at the torch boundary.
#pragma once

#include "slkernels/sparse.h"
#include "torch/tensor.h"

namespace slk {

// Checks dtypes and shapes of (crow, col) for an [n, m] support, and, with `validate`, every index; returns the view
// that kernels take. Raises with the position of the first fault. crow and col must be contiguous.
Csr as_csr(const char* op, const Tensor& crow, const Tensor& col, int64_t n, int64_t m, bool validate);

// Values as fp32 (a view if they are), for kernels that sum in fp32.
Tensor values_f32(const Tensor& values);

// y (+)= x S^T for token-major x [T, m] and y [T, n]; values as fp32 (fp64 when x is).
void spmm_cpu_into(const Csr& s, const Tensor& values, const Tensor& x, const Tensor& y, bool accumulate);

// A CSR of S^T, with the tensors that own its arrays.
struct TransposedCsr {
  Tensor crow, row, values;
  Csr csr;
};
TransposedCsr transposed(const Csr& s, const Tensor& crow, const Tensor& values);

// dv = (dy^T x) at the support, in dy's dtype.
Tensor sddmm_cpu(const Csr& s, const Tensor& dy, const Tensor& x);

// W at the support; W = alpha B A + S + base (A and B null together).
Tensor gather_cpu(const Csr& s, const Tensor& w);
Tensor compose_cpu(const Csr& s, const Tensor& values, const Tensor* A, const Tensor* B, double alpha,
                   const Tensor* base);

// A [rank, m], B [n, rank], dtypes like `like`.
void check_lowrank(const char* op, const Tensor& A, const Tensor& B, int64_t n, int64_t m, const char* like_name,
                   const Tensor& like);

}  // namespace slk
