// Host bodies of slkernels/ptx/mma_sp.h: warp collectives, with the sums of ptx_mma.h. Metadata that is not one of the
// six ordered codes is a fault where the selected lanes hold it.
#pragma once

#include "simt/ptx_mma.h"

namespace simt {
void mma_sp(MmaType type, int selector, float* d, const uint32_t* a, const uint32_t* b, uint32_t meta, void* pc);
}  // namespace simt

namespace slk::ptx {

template <int kSelector>
SIMT_NOINLINE void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  static_assert(kSelector == 0 || kSelector == 1);
  simt::mma_sp(simt::MmaType::bf16, kSelector, d, a, b, meta, SIMT_HERE);
}
template <int kSelector>
SIMT_NOINLINE void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  static_assert(kSelector == 0 || kSelector == 1);
  simt::mma_sp(simt::MmaType::f16, kSelector, d, a, b, meta, SIMT_HERE);
}

}  // namespace slk::ptx
