// Family `project`: gradients in a low-rank subspace, and weight updates out of it.
//
//   update      W <- decay W + step T + (step f) G, rounded once, on rows of W [n, m]
//               decay = 1 - lr weight_decay, step = -lr alpha. T: a slice of the back projection. G: the gradient, f a
//               factor for a row, for a column, or for all. Either may be absent.
//   squares     sums of squares of the rows or the columns of a matrix
//   normals     rows of Z / sqrt(rank), Z[j, i] a standard normal of (seed, j, i): random_normal.cuh
//
// W is fp32, bf16 or fp16, or 8-bit codes in groups (project_quant.h), in which case the new range of a group is found
// and its elements are quantized in the same pass. Arithmetic is fp32; each line above is a chain of FMAs in the order
// written, so that all devices give the same bits.
//
// Stochastic rounding takes 16 random bits an element, of RoundingBits (philox.cuh) with tensor 0 and element i m + j.
#pragma once

#include "slkernels/philox.cuh"
#include "slkernels/types.h"

namespace slk {

enum class FactorOf : int { all, row, column };

// The matrices of an update; leading dimensions in elements, columns of unit stride.
struct UpdateOperands {
  const void* t;  // or null; its row 0 belongs to row t_row of W
  DType t_type;
  int64_t ldt, t_row;
  const void* g;  // or null
  DType g_type;
  int64_t ldg;
  const float* factor;  // of G
  FactorOf factor_of;
};

struct StochasticRounding {
  bool on;
  uint64_t seed;
  uint32_t step;
};

// What an update's scalars become, on every device.
struct UpdateScalars {
  float decay, step;
  SLK_HD static UpdateScalars of(float lr, float alpha, float weight_decay) {
#if defined(__CUDA_ARCH__)
    return {__fmaf_rn(-lr, weight_decay, 1.0f), __fmul_rn(-lr, alpha)};
#else
    return {__builtin_fmaf(-lr, weight_decay, 1.0f), -lr * alpha};
#endif
  }
};

// From sums of squares of the channels of N, R and G to the factor of each channel of G (apollo_scale_update_):
//   s = |N| / (|R| + 1e-8);  u = sqrt(sum s^2 (G^2 - (residual ? R^2 : 0)));  c = max(u / (norm + 1e-8), limiter) /
//   limiter where norm and limiter are positive, else 1;  norm <- u / c where u is finite;  factor = s / c
struct ApolloSums {
  const float *n2, *r2, *g2;  // [channels]
  int64_t channels;
  bool per_tensor;  // one s for all: factor has one element
  bool residual;
  float limiter;
};
void apollo_factors(const ApolloSums&, float* norm, float* factor);  // on the host

namespace cpu {

struct ProjectKernels {
  // Rows of w [n, m], contiguous.
  void (*update)(DType type, void* w, int64_t m, const UpdateOperands&, const UpdateScalars&, const StochasticRounding&,
                 Range rows);
  // sums[i] of row i of x; columns of unit stride.
  void (*row_squares)(DType type, const void* x, int64_t ld, int64_t columns, Range rows, float* sums);
  // sums[j] of column j.
  void (*column_squares)(DType type, const void* x, int64_t ld, int64_t rows, Range columns, float* sums);
  // out [rows, columns] = scale Z there, contiguous; columns.begin is a multiple of kNormalBlock.
  void (*normals)(DType type, uint64_t seed, float scale, Range rows, Range columns, void* out);
  // out[j, c] = sum_i z[j, i] x[i, c] for the columns c in `columns`: z fp32 [few, rows], out fp32 [few, ld_out].
  void (*few_rows)(DType type, const float* z, int64_t few, const void* x, int64_t ld, int64_t rows, Range columns,
                   float* out, int64_t ld_out);
};
const ProjectKernels& project_kernels();

// Most rows of Z that take a pass over G of their own kernel; beyond, the dense library's blocking wins.
constexpr int64_t kFewRows = 8;

}  // namespace cpu
}  // namespace slk
