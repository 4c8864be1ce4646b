// mma.sp.sync: d = a b + d on the tensor cores by the 32 lanes of a warp, a sparse: two of every four neighbours along
// k are kept. fp32 sums. PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction with sparse matrix A",
// sections "Sparse matrix storage" and "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". sm_80.
//
// With g = lane / 4 and t = lane % 4, a lane holds of each matrix, two neighbours a register, the lower in its lower
// half:
//
//   a [16, 32], as the [16, 16] of what is kept                b [32, 8] (two neighbouring rows a register)
//                kept 2t, 2t+1   2t+8, 2t+9                                          column g
//      row g          a[0]          a[2]                       rows 2t, 2t+1           b[0]
//      row g + 8      a[1]          a[3]                       rows 2t+8,  2t+9        b[1]
//                                                              rows 2t+16, 2t+17       b[2]
//   d [16, 8] (fp32)                                           rows 2t+24, 2t+25       b[3]
//                columns 2t    2t+1
//      row g           d[0]    d[1]
//      row g + 8       d[2]    d[3]
//
// That is mma.m16n8k16's a and d, and its b twice (mma.h), with the same ldmatrix. What was kept stands in `meta`: 4
// bits a group of four columns, semi24.h's codes (first position | second << 2, first < second; others are undefined
// behaviour). Two lanes of each four have the 32 groups of rows g and g + 8; kSelector says which two, the others'
// words are not read:
//
//   meta         columns 0-15                                    columns 16-31
//      row g        lane 4g + 2 kSelector,     bits 0-15            lane 4g + 2 kSelector + 1, bits 0-15
//      row g + 8    lane 4g + 2 kSelector,     bits 16-31           lane 4g + 2 kSelector + 1, bits 16-31
//
// so that one word a lane serves 32 rows: rows 0-15 with selector 0, rows 16-31 with selector 1.
// ::ordered_metadata (PTX 8.5) promises first < second; ptxas 13.0 warns that without it future architectures are slow.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_mma_sp.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace slk::ptx {

template <int kSelector>
__device__ inline void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                            uint32_t meta) {
  static_assert(kSelector == 0 || kSelector == 1);
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),
        "n"(kSelector));
}
template <int kSelector>
__device__ inline void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t meta) {
  static_assert(kSelector == 0 || kSelector == 1);
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),
        "n"(kSelector));
}

}  // namespace slk::ptx
#endif
