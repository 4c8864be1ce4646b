// The 32-bit address of shared memory, which is what PTX operands of the .shared window and matrix descriptors hold.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace slk::ptx {

// PTX ISA, "cvta": from a generic pointer into shared memory.
__device__ inline uint32_t shared_address(const void* p) {
#ifdef SLK_SIMT
  return simt::shared_address(p);
#else
  return uint32_t(__cvta_generic_to_shared(p));
#endif
}

}  // namespace slk::ptx
