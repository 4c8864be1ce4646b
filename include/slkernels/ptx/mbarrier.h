// mbarrier: a barrier in shared memory on which threads and asynchronous copies meet. PTX ISA, "Parallel
// Synchronization and Communication Instructions: mbarrier". sm_90 (its bulk copies need it); a barrier is 8 bytes,
// 8-byte aligned.
//
// A phase completes when `arrivals` arrivals have come and the transaction count is back at zero: expect_tx raises it
// by the bytes announced, a bulk copy lowers it by the bytes it wrote. The next phase starts at once, with the same
// count.
//
// Parity: wait(bar, p) returns once the phase of parity p has completed; the first phase has parity 0. On a fresh
// barrier a wait for parity 1 returns at once ("the phase before the first"), which is what the first fill of a ring
// wants.
//
// Arrivals release and waits acquire at CTA scope: what a thread did before its arrival is seen after the wait.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_mbarrier.h"
#else

#include "slkernels/ptx/shared_address.h"

namespace slk::ptx {

// mbarrier.init. One thread; then fence_mbarrier_init() and a barrier, before anybody else touches it.
__device__ inline void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}

// mbarrier.inval: the bytes may serve for something else afterwards.
__device__ inline void mbarrier_inval(uint64_t* bar) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

// mbarrier.arrive (release, CTA scope): one arrival.
__device__ inline void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

// mbarrier.arrive.expect_tx: announces `bytes` of bulk copies for the current phase, then arrives once.
__device__ inline void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity (acquire, CTA scope): true once the phase of `parity` has completed; may give up after a
// time that the hardware chooses.
__device__ inline bool mbarrier_try_wait(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ inline void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  while (!mbarrier_try_wait(bar, parity)) {
  }
}

}  // namespace slk::ptx
#endif
