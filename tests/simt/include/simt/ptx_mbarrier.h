// Host bodies of slkernels/ptx/mbarrier.h. What is checked: runtime/ptx_mbarrier.cpp.
#pragma once

#include "simt/device.h"

namespace simt {

void mbarrier_init(uint64_t* bar, uint32_t arrivals, void* pc);
void mbarrier_inval(uint64_t* bar, void* pc);
void mbarrier_arrive(uint64_t* bar, uint32_t expected_bytes, void* pc);
void mbarrier_wait(uint64_t* bar, uint32_t parity, void* pc);

// For bulk copies: the agent that they run as, and the bytes they wrote, knowing what `knows` knows.
int mbarrier_agent(uint64_t* bar, void* pc);
void mbarrier_complete_tx(uint64_t* bar, uint32_t bytes, const Clock& knows, void* pc);

// The running thread's inits become visible to the async proxy.
void fence_mbarrier_init();

}  // namespace simt

namespace slk::ptx {

SIMT_NOINLINE void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  simt::mbarrier_init(bar, arrivals, SIMT_HERE);
}
SIMT_NOINLINE void mbarrier_inval(uint64_t* bar) {
  simt::mbarrier_inval(bar, SIMT_HERE);
}
SIMT_NOINLINE void mbarrier_arrive(uint64_t* bar) {
  simt::mbarrier_arrive(bar, 0, SIMT_HERE);
}
SIMT_NOINLINE void mbarrier_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  simt::mbarrier_arrive(bar, bytes, SIMT_HERE);
}
// Never gives up: whoever polls it in a loop waits here.
SIMT_NOINLINE bool mbarrier_try_wait(uint64_t* bar, uint32_t parity) {
  simt::mbarrier_wait(bar, parity, SIMT_HERE);
  return true;
}
SIMT_NOINLINE void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  simt::mbarrier_wait(bar, parity, SIMT_HERE);
}

}  // namespace slk::ptx
