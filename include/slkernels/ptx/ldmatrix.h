// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between shared memory and the registers of a warp, in the
// layout that mma takes. PTX ISA, "Warp Level Matrix Load Instruction: ldmatrix" (sm_75) and "... Store ...: stmatrix"
// (sm_90).
//
// A row of 8 elements is 16 bytes, 16-byte aligned, anywhere in shared memory. Lane 8 i + r gives the address of row r
// of matrix i; the addresses of lanes beyond 8 * matrices are not used. Register i of a lane then holds two elements
// of matrix i:
//
//              column 0  1   2  3   4  5   6  7
//     row 0       lane 0  lane 1  lane 2  lane 3        lane l: row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1,
//     row 1       lane 4  lane 5  lane 6  lane 7                the lower column in the lower half
//     ...                                               with .trans: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4,
//     row 7       lane 28 lane 29 lane 30 lane 31               that is, the same picture of the transposed matrix
//
// All 32 lanes execute the same instruction. An 8x8 matrix is read in one pass if its 8 rows lie in distinct 16-byte
// columns of the 128-byte line of banks: hence the swizzles of the kernels.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_ldmatrix.h"
#else

#include "slkernels/ptx/shared_address.h"

namespace slk::ptx {

__device__ inline void ldmatrix_x1(uint32_t (&d)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(d[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2(uint32_t (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x1_trans(uint32_t (&d)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(d[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// The way back; sm_90 and newer.
__device__ inline void stmatrix_x1(void* row, const uint32_t (&s)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(shared_address(row)), "r"(s[0]) : "memory");
}
__device__ inline void stmatrix_x2(void* row, const uint32_t (&s)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(s[0]),
               "r"(s[1])
               : "memory");
}
__device__ inline void stmatrix_x4(void* row, const uint32_t (&s)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(s[0]),
               "r"(s[1]), "r"(s[2]), "r"(s[3])
               : "memory");
}

}  // namespace slk::ptx
#endif
