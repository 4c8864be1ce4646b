// Host bodies of slkernels/ptx/ldmatrix.h: warp collectives; each lane answers for the row whose address it gives.
#pragma once

#include "simt/device.h"

namespace simt {
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, void* pc);
void stmatrix(void* row, const uint32_t* registers, int matrices, void* pc);
}  // namespace simt

namespace slk::ptx {

#define SIMT_MATRIX(count)                                                              \
  SIMT_NOINLINE void ldmatrix_x##count(uint32_t (&d)[count], const void* row) {         \
    simt::ldmatrix(d, row, count, false, SIMT_HERE);                                    \
  }                                                                                     \
  SIMT_NOINLINE void ldmatrix_x##count##_trans(uint32_t (&d)[count], const void* row) { \
    simt::ldmatrix(d, row, count, true, SIMT_HERE);                                     \
  }                                                                                     \
  SIMT_NOINLINE void stmatrix_x##count(void* row, const uint32_t (&s)[count]) {         \
    simt::stmatrix(row, s, count, SIMT_HERE);                                           \
  }
SIMT_MATRIX(1)
SIMT_MATRIX(2)
SIMT_MATRIX(4)
#undef SIMT_MATRIX

}  // namespace slk::ptx
