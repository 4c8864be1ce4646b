// The one way a kernel is launched, so that the same source serves nvcc and the host harness that stands in for it.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace slk::cuda {

// The block's dynamic shared memory, 1024-byte aligned: what the widest swizzle of TMA and wgmma asks for.
template <class T>
__device__ T* dynamic_shared() {
#ifdef SLK_SIMT
  return static_cast<T*>(simt::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char slk_dynamic_shared[];
  return reinterpret_cast<T*>(slk_dynamic_shared);
#endif
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...); arguments are converted to the kernel's parameter types.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument a kernel parameter");
#ifdef SLK_SIMT
  (void)stream;
  const auto thread = [&]() __attribute__((no_sanitize("thread"))) { kernel(static_cast<Params>(args)...); };
  simt::launch(reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
               shared_bytes, simt::call<decltype(thread)>, &thread);
  return cudaSuccess;
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
#endif
}

}  // namespace slk::cuda
