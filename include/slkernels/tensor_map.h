// Tensor maps: what TMA (slkernels/ptx/tma.h) needs to know of a tensor in global memory. Host code; the encoder
// belongs to the driver and is found through the runtime, so that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace slk::cuda {

// A tensor of `kRank` dimensions, innermost first, cut in tiles of `box` elements.
template <int kRank>
struct TensorMap {
  CUtensorMapDataType type;
  const void* base;        // 16-byte aligned
  uint64_t size[kRank];    // elements
  uint64_t stride[kRank];  // bytes, multiples of 16; stride[0] is the element's size
  uint32_t box[kRank];     // elements, at most 256; the innermost at most the swizzle's bytes
  CUtensorMapSwizzle swizzle;
};

// cuTensorMapEncodeTiled (CUDA Driver API, "Tensor Map Object Management"). cudaErrorInvalidValue where the driver
// refuses.
template <int kRank>
cudaError_t encode(const TensorMap<kRank>& tensor, CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  uint32_t element_strides[kRank];
  for (uint32_t& s : element_strides) s = 1;
  const CUresult result = reinterpret_cast<Encode>(entry)(
      map, tensor.type, kRank, const_cast<void*>(tensor.base), tensor.size, tensor.stride + 1, tensor.box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, tensor.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace slk::cuda
