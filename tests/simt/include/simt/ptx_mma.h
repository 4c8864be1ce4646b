// Host bodies of slkernels/ptx/mma.h: warp collectives. Products are exact in fp32; they are added to d one after the
// other, k ascending, each sum rounded to nearest. The hardware's order is another: compare with a tolerance.
#pragma once

#include "simt/device.h"

namespace simt {
enum class MmaType { bf16, f16, tf32 };
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, void* pc);
}  // namespace simt

namespace slk::ptx {

SIMT_NOINLINE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(simt::MmaType::bf16, d, a, b, SIMT_HERE);
}
SIMT_NOINLINE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(simt::MmaType::f16, d, a, b, SIMT_HERE);
}
SIMT_NOINLINE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma(simt::MmaType::tf32, d, a, b, SIMT_HERE);
}

}  // namespace slk::ptx
