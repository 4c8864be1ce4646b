// Host bodies of slkernels/ptx/wgmma.h. What is checked, and when the operands are read: runtime/ptx_wgmma.cpp.
#pragma once

#include "simt/device.h"

namespace simt {

void wgmma_fence(void* pc);
void wgmma_bf16(float* registers, int n, uint64_t a, uint64_t b, bool accumulate, void* pc);
void wgmma_commit(void* pc);
void wgmma_wait(size_t pending, void* pc);

}  // namespace simt

namespace slk::ptx {

SIMT_NOINLINE void wgmma_fence() {
  simt::wgmma_fence(SIMT_HERE);
}
template <int N>
SIMT_NOINLINE void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  simt::wgmma_bf16(d, N, a, b, accumulate, SIMT_HERE);
}
SIMT_NOINLINE void wgmma_commit() {
  simt::wgmma_commit(SIMT_HERE);
}
template <int kPending>
SIMT_NOINLINE void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7);
  simt::wgmma_wait(kPending, SIMT_HERE);
}
template <int M>
void wgmma_settle(float (&)[M]) {}

}  // namespace slk::ptx
