// Family `semi24`, products on a CPU. W [n, m] in layout plain (semi24.h), activations token-major, all of one type:
//
//   linear   y[T, n]  = act(x[T, m] W^T + bias)
//   grad_x   dx[T, m] = dy[T, n] W
//   grad_w   dvalues[n, 2 G] = (dy^T x) at the kept slots; 0 at kept padding columns
//
// Sums in fp32 (fp64 for f64), rounded once, in an order that depends on the length of the sum only: neither on the
// number of threads, nor, except between few tokens and many, on the other tokens of the call.
#pragma once

#include "slkernels/semi24_gemm.h"
#include "slkernels/sparse.h"

namespace slk {

struct Weight24 {  // plain, contiguous
  const void* values;
  const uint8_t* meta;
  int64_t n, m;
};

namespace cpu {

// Up to here each row of W is read once for all tokens; beyond, panels of tokens are multiplied (semi24_linear.cpp).
constexpr int64_t kFewTokens24 = 8;
// Elements of a row of x that the kernels for few tokens read at once: rows of x are padded with zeros to a multiple.
constexpr int64_t kFewTokensPad = 32;

// A task of the panel kernels: at most this many tokens, and rows of W (columns for grad_x).
constexpr int64_t kPanelTokens24 = 128, kPanelRows24 = 512;
// Columns of W (rows for grad_x, 64 too) that are summed in one chain.
constexpr int64_t kDepth24 = 64;
constexpr int64_t kPanelScratch24 = (kDepth24 + kPanelRows24) * kPanelTokens24;  // floats
// Tasks of grad_w: rows and columns of W.
constexpr int64_t kGradRows24 = 256, kGradColumns24 = 1024;
constexpr int64_t kGradScratch24 = (kDepth24 + kGradRows24) * kPanelTokens24 + kGradRows24 * kGradColumns24 / 2;

// The columns of a slice of W, as lists of kept elements, block by block of kDepth24 rows.
struct ColumnLists24 {
  float* values;   // [blocks, kDepth24 * kept24(columns)]
  uint8_t* rows;   // the same shape: row within its block
  int32_t* start;  // [blocks, columns + 1]: where a column's list starts within its block's
  Range columns;   // first column a multiple of 8
};

struct Semi24LinearKernels {
  // y[t, i] for a tile of at most kPanelRows24 rows i of W and kPanelTokens24 tokens t. scratch: kPanelScratch24
  // floats.
  void (*linear)(DType, const Weight24&, const Matrix& x, const void* bias, Activation24, Range rows, Range tokens,
                 const Matrix& y, float* scratch);

  // The same for x.rows <= kFewTokens24, x fp32 and padded: rows of kFewTokensPad elements' multiples.
  void (*linear_few)(DType, const Weight24&, const Matrix& x, const void* bias, Activation24, Range rows,
                     const Matrix& y);

  // grad_x in two steps: the lists of `blocks`, then a tile of at most kPanelRows24 columns of the slice.
  void (*column_lists)(DType, const Weight24&, Range blocks, const ColumnLists24&);
  void (*grad_x)(DType, const ColumnLists24&, const Matrix& dy, Range columns, Range tokens, const Matrix& dx,
                 float* scratch);

  // dvalues for at most kGradRows24 rows and kGradColumns24 columns of W, whose first is a multiple of kDepth24;
  // w.values is not read. scratch: kGradScratch24 floats.
  void (*grad_w)(DType, const Weight24& w, const Matrix& dy, const Matrix& x, Range rows, Range columns, void* dvalues,
                 float* scratch);
};
const Semi24LinearKernels& semi24_linear_kernels();

// fp64, unblocked: for gradient checks. `rows` are rows of W.
void linear24_f64(const Weight24&, const Matrix& x, const double* bias, Activation24, Range tokens, const Matrix& y);
void grad_x24_f64(const Weight24&, const Matrix& dy, Range tokens, const Matrix& dx);
void grad_w24_f64(const Weight24& w, const Matrix& dy, const Matrix& x, Range rows, double* dvalues);

}  // namespace cpu
}  // namespace slk
