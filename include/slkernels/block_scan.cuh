// Prefix sums within a block.
#pragma once

#include <cuda_runtime.h>

namespace slk::cuda {

// Inclusive prefix sum over the block's threads; `sums` has room for a word a warp.
__device__ inline int block_inclusive_scan(int value, int* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, value, step);
    if (lane >= step) value += below;
  }
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  if (warp == 0) {
    int total = lane < warps ? sums[lane] : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, total, step);
      if (lane >= step) total += below;
    }
    if (lane < warps) sums[lane] = total;
  }
  __syncthreads();
  if (warp > 0) value += sums[warp - 1];
  return value;
}

}  // namespace slk::cuda
