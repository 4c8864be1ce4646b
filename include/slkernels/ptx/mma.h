// mma.sync: d = a b + d on the tensor cores by the 32 lanes of a warp, fp32 sums. PTX ISA, "Warp Level Matrix Multiply-
// Accumulate Instructions: mma", sections "Matrix Fragments for mma.m16n8k16 with floating point type" and "...
// mma.m16n8k8". sm_80.
//
// With g = lane / 4 and t = lane % 4, a lane holds of each matrix:
//
//   a [16, 16] (bf16, fp16: two neighbouring columns a register)      b [16, 8] (two neighbouring rows a register)
//                columns 2t, 2t+1   2t+8, 2t+9                                       column g
//      row g           a[0]            a[2]                           rows 2t, 2t+1    b[0]
//      row g + 8       a[1]            a[3]                           rows 2t+8, 2t+9  b[1]
//
//   d [16, 8] (fp32)                                                  a [16, 8], b [8, 8] (tf32: one element a
//   register)
//                columns 2t    2t+1                                               column t   t+4            column g
//      row g           d[0]    d[1]                                   row g         a[0]     a[2]   row t     b[0]
//      row g + 8       d[2]    d[3]                                   row g + 8     a[1]     a[3]   row t + 4 b[1]
//
// The lower column or row of a pair is in the register's lower half. ldmatrix of the four 8x8 quarters of a row-major A
// tile gives a; ldmatrix (not transposed) of B^T stored row-major, [n, k], gives b.
// The order in which the hardware adds a product's terms is not specified.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_mma.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace slk::ptx {

__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// a and b hold fp32 bits, of which the tensor cores read the upper 19: sign, exponent, 10 bits of mantissa.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace slk::ptx
#endif
