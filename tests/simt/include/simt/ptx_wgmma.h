// Host bodies of slkernels/ptx/wgmma.h. What is checked, and when the operands are read: runtime/ptx_wgmma.cpp.
#pragma once

#include "simt/device.h"

namespace simt {

void wgmma_fence(void* pc);
enum class WgmmaType { bf16, f16 };
// a_registers: A's four, or null where `a` describes it. With them, B is N-major.
void wgmma(WgmmaType type, float* registers, int n, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, void* pc);
void wgmma_commit(void* pc);
void wgmma_wait(size_t pending, void* pc);

}  // namespace simt

namespace slk::ptx {

SIMT_NOINLINE void wgmma_fence() {
  simt::wgmma_fence(SIMT_HERE);
}
#define SIMT_WGMMA(type)                                                                                              \
  template <int N>                                                                                                    \
  SIMT_NOINLINE void wgmma_##type(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {                       \
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);                                                                  \
    simt::wgmma(simt::WgmmaType::type, d, N, nullptr, a, b, accumulate, SIMT_HERE);                                   \
  }                                                                                                                   \
  template <int N>                                                                                                    \
  SIMT_NOINLINE void wgmma_registers_##type(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
    static_assert(N == 64 || N == 128 || N == 256);                                                                   \
    simt::wgmma(simt::WgmmaType::type, d, N, a, 0, b, accumulate, SIMT_HERE);                                         \
  }
SIMT_WGMMA(bf16)
SIMT_WGMMA(f16)
#undef SIMT_WGMMA
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
