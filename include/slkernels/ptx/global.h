// Stores of 8 and 16 bytes to global memory that stay one instruction: the compiler may take a struct's store apart,
// and then does not always find it together again. PTX ISA, "st".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace slk::ptx {

__device__ inline void store_global(void* to, uint2 x) {
#ifdef SLK_SIMT
  *static_cast<uint2*>(to) = x;
#else
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
#endif
}
__device__ inline void store_global(void* to, uint4 x) {
#ifdef SLK_SIMT
  *static_cast<uint4*>(to) = x;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}

}  // namespace slk::ptx
