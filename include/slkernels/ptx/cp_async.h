// cp.async: copies from global to shared memory that a thread starts and waits for later. PTX ISA, "Data Movement and
// Conversion Instructions: Non-bulk copy" (cp.async, cp.async.commit_group, cp.async.wait_group). sm_80.
//
// A thread collects its copies in groups: commit_group ends one, and wait_group<N> waits until at most the N youngest
// are still under way. It waits for the thread's own copies only: others see the data after a barrier that follows it.
//
//   cp_async_16(stage 0); commit_group(); cp_async_16(stage 1); commit_group();
//   wait_group<1>();   // stage 0 is here, stage 1 may not be
//   __syncthreads();   // everybody's part of stage 0 is here
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_cp_async.h"
#else

#include "slkernels/ptx/shared_address.h"

namespace slk::ptx {

// Copies the first `bytes` (0 to 16) bytes of `from` and fills the rest of the 16 at `to` with zeros; both are 16-byte
// aligned. With bytes = 0 nothing is read. Past L1 (.cg), and with a hint to fetch the 128 bytes around into L2.
__device__ inline void cp_async_16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// The same with 8 and 4 bytes, 8- and 4-byte aligned; through L1 (.ca), as only 16 can pass it.
__device__ inline void cp_async_8(void* to, const void* from, int bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void cp_async_4(void* to, const void* from, int bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Ends the group of copies issued since the last commit; it may be empty.
__device__ inline void commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but the N youngest committed groups of this thread are complete.
template <int N>
__device__ inline void wait_group() {
  static_assert(N >= 0);
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Until all copies of this thread are complete, committed or not.
__device__ inline void wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace slk::ptx
#endif
