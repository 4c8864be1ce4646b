// Roles of warps in a warp-specialised kernel: electing a lane, moving registers between warpgroups, and barriers among
// some of a block's warps. sm_90a.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_warp.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace slk::ptx {

// elect.sync (PTX ISA, "elect.sync"): true in one lane of a converged warp, the same one every time.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// setmaxnreg.dec/.inc (PTX ISA, "setmaxnreg"): gives registers of this warpgroup back to the block's pool, or takes
// some from it (and waits until there are enough). All warps of a warpgroup; a multiple of 8 in 24..256. The kernel
// needs __launch_bounds__(threads, 1), and each role must be one branch of one if/else.
template <int kRegisters>
__device__ inline void register_dealloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void register_alloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// bar.sync / bar.arrive (PTX ISA, "bar"): barrier `id` (1..15; 0 is __syncthreads') of `threads` threads, whole warps.
// arrive does not wait, and orders what came before it ahead of what follows the others' sync.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace slk::ptx
#endif
