// Family `project`, quantized weights: asymmetric codes of 8 or 4 bits in groups along the rows of W [n, m].
//
//   hi = max(w, 0), lo = min(w, 0) of a group;  top = 2^bits - 1
//   scale = (hi - lo) / top;  zero = rint(-lo / scale)
//   code = clamp(rint(w / scale) + zero, 0, top);  w is read as (code - zero) scale
//
// each an fp32 operation rounded once, rint to nearest even: all devices give the same codes. Stochastic rounding takes
// the element's 16 bits (RoundingBits, tensor 0, element i m + j) and rounds w / scale up where they are, over 2^16,
// below the fraction. The range includes 0: 0 is stored exactly, and zero fits its byte without a clamp that would bend
// the group. A group of zeros has scale 0 and zero 0; one with a NaN or an infinity has scale NaN, zero and codes 0.
//
// 4-bit codes are packed two a byte, the even column in the high half; the last low half of an odd row is 0.
#pragma once

#include "slkernels/project.h"

namespace slk {

constexpr int64_t kGroupMultiple = 16, kMaxGroup = 4096;  // a group stays in L1 as fp32

struct GroupCodes {
  uint8_t* codes;  // [n, row_bytes()]
  float* scale;    // [n, groups()]
  uint8_t* zero;   // [n, groups()]
  int64_t m, group;
  int bits;
  SLK_HD __attribute__((always_inline)) int64_t groups() const { return (m + group - 1) / group; }
  SLK_HD __attribute__((always_inline)) int64_t row_bytes() const { return bits == 8 ? m : (m + 1) / 2; }
};

// Most tokens that the linear kernels take, in one pass over the codes: beyond, slices of W are dequantized for the
// dense library. Fewer on a CPU, where the library's 16-bit products have twice the rate of the kernel's fp32
// arithmetic.
constexpr int64_t kFewTokens = 16, kFewTokensCpu = 8;

namespace cpu {

struct QuantKernels {
  // Rows of w [n, m], contiguous.
  void (*quantize)(DType type, const void* w, const GroupCodes&, const StochasticRounding&, Range rows);
  // out [rows, columns] (its first element is that of rows.begin, columns.begin) = W there; columns.begin is a multiple
  // of the group.
  void (*dequantize)(const GroupCodes&, Range rows, Range columns, DType type, void* out, int64_t ld_out);
  // W <- Q(decay W + step T + (step f) G), 8 bits.
  void (*update)(const GroupCodes&, const UpdateOperands&, const UpdateScalars&, const StochasticRounding&, Range rows);
  // y[t, i] = sum_j W[i, j] x[t, j] + bias[i] for the rows i of W; x [tokens, m] and y [tokens, n] fp32, contiguous;
  // bias fp32 or null; 8 bits.
  void (*linear)(const GroupCodes&, const float* x, int64_t tokens, int64_t n, Range rows, const float* bias, float* y);
};
const QuantKernels& quant_kernels();

}  // namespace cpu
}  // namespace slk
