// The one way a kernel is launched, so that the same source serves nvcc and the host harness that stands in for it.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace slk::cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(args...); arguments are converted to the kernel's parameter types.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument a kernel parameter");
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
}

}  // namespace slk::cuda
