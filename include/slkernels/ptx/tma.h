// TMA: bulk copies of tensor tiles between global and shared memory, described by a tensor map (slkernels/tensor_map.h)
// that the kernel takes by value as a `const __grid_constant__` parameter. PTX ISA, "Data Movement and Conversion
// Instructions: Tensor copy". sm_90.
//
// One thread issues a copy. Coordinates are those of the tile's first element, innermost dimension first, in elements;
// they may lie outside: elements outside read as zero (and count in the transaction), and are not written.
// A tile in shared memory is 128-byte aligned, rows of the innermost dimension packed; with a swizzle of 32, 64 or 128
// bytes, bits 4.. of the byte address are exclusive-ored with its bits 7.. (1, 2, 3 bits): no column of 16-byte units
// then falls on one bank.
#pragma once

#ifdef SLK_SIMT
#include "simt/ptx_tma.h"
#else

#include <cuda.h>

#include "slkernels/ptx/shared_address.h"

namespace slk::ptx {

// prefetch.tensormap: fetches the descriptor ahead of its first use.
__device__ inline void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor, global -> shared: lowers the transaction count of `bar` by the tile's bytes when they are
// there.
__device__ inline void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y)
      : "memory");
}
__device__ inline void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void tma_load_4d(void* to, const CUtensorMap* map, uint64_t* bar, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// cp.async.bulk.tensor, shared -> global. The source was written by ordinary stores: fence_proxy_async() in each writer
// and a barrier come first.
__device__ inline void tma_store_2d(const CUtensorMap* map, const void* from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}
__device__ inline void tma_store_3d(const CUtensorMap* map, const void* from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// cp.async.bulk.commit_group: this thread's stores since the last commit become a group.
__device__ inline void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// cp.async.bulk.wait_group[.read]: until at most kPending of this thread's latest groups are unfinished; with read,
// until their shared memory may be written again (their global writes may still be under way).
template <int kPending>
__device__ inline void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ inline void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace slk::ptx
#endif
