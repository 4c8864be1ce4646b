// Fences between the generic proxy (ordinary loads and stores, ldmatrix, stmatrix) and the async proxy (bulk copies,
// wgmma's reads of shared memory). PTX ISA, "membar / fence". sm_90.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_fence.h"
#else

#include <cuda_runtime.h>

namespace slk::ptx {

// fence.proxy.async.shared::cta: makes this thread's earlier ordinary writes to shared memory visible to the async
// proxy. Each writing thread runs it, then a barrier, then one thread issues the copy (or all the wgmma).
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// fence.mbarrier_init.release.cluster: makes this thread's mbarrier_init visible to the async proxy, which will count
// bytes on it.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace slk::ptx
#endif
