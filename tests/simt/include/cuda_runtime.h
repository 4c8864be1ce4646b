// Stand-in for the CUDA runtime: with this folder first on the include path, g++ compiles the hand-written kernels of
// csrc/cuda unchanged. Types come from the toolkit's own headers; the words of the language come from simt/device.h.
#pragma once

#define SLK_SIMT 1

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

// Static shared memory is thread-local storage: `__shared__ float a[64];` becomes a block-scope static that lies in one
// segment, whose address range the runtime knows, poisons before every block, and watches. (Blocks run one after
// another.) __constinit: without it, classes such as __nv_bfloat16 would bring a guard variable into that segment.
#undef __shared__
#define __shared__ __constinit thread_local

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simt/device.h"

// As cuda_runtime.h's overload for kernels; the host functions of cuda_runtime_api.h are in runtime/cudart.cpp.
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    simt::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), size_t(value));
  return cudaSuccess;
}
