// Prefix sums that several kernels share.
#pragma once

#include "slkernels/block_scan.cuh"
#include "slkernels/launch.cuh"

namespace slk::cuda {

constexpr int kScanThreads = 1024;  // one block scans everything: as wide as a block can be

// crow[1..n] holds counts on entry and their inclusive prefix sums on exit; cursor[r] = crow[r], unless it is null.
static __global__ void scan_kernel(int64_t n, int32_t* crow, int32_t* cursor) {
  __shared__ int sums[kScanThreads / 32];
  int carry = 0;
  for (int64_t first = 0; first < n; first += kScanThreads) {
    const int64_t r = first + threadIdx.x;
    const int count = r < n ? crow[r + 1] : 0;
    const int inclusive = block_inclusive_scan(count, sums);
    if (r < n) {
      if (cursor) cursor[r] = carry + inclusive - count;
      crow[r + 1] = carry + inclusive;
    }
    carry += sums[kScanThreads / 32 - 1];
    __syncthreads();  // sums is rewritten by the next pass
  }
}

}  // namespace slk::cuda
