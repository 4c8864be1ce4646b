// The few functions of the driver, and of the runtime that asks for the driver and the device, that launchers call.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "simt/runtime.h"
#include "tensor_map.h"

namespace {

int element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

}  // namespace

extern "C" {

// CUDA Driver API, "Tensor Map Object Management": the same conditions. Interleaved layouts, element strides other than
// 1 and the 128-byte swizzles with other atoms are not modelled, and refused.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const int element = element_bytes(type);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
      swizzle > CU_TENSOR_MAP_SWIZZLE_128B || !element || rank > simt::kMapRank)
    return CUDA_ERROR_NOT_SUPPORTED;
  if (!map || reinterpret_cast<uintptr_t>(map) % 64 || !base || reinterpret_cast<uintptr_t>(base) % 16 || rank < 1)
    return CUDA_ERROR_INVALID_VALUE;
  simt::EncodedMap encoded = {};
  encoded.magic = simt::EncodedMap::kMagic;
  encoded.rank = int(rank);
  encoded.element = element;
  encoded.swizzle_bits = int(swizzle);
  encoded.base = static_cast<const char*>(base);
  for (cuuint32_t i = 0; i < simt::kMapRank; ++i) {
    encoded.size[i] = encoded.box[i] = 1;
    if (i >= rank) continue;
    encoded.size[i] = size[i];
    encoded.box[i] = box[i];
    encoded.stride[i] = i ? stride[i - 1] : uint64_t(element);
    if (size[i] < 1 || size[i] > uint64_t(1) << 32 || box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (i && (stride[i - 1] % 16 || stride[i - 1] >= uint64_t(1) << 40)) return CUDA_ERROR_INVALID_VALUE;
    if (element_stride[i] < 1 || element_stride[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    if (element_stride[i] != 1) return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (encoded.row_bytes() % 16) return CUDA_ERROR_INVALID_VALUE;
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && encoded.row_bytes() > 16u << encoded.swizzle_bits)
    return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  std::memcpy(static_cast<void*>(map), &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *entry = std::strcmp(symbol, "cuTensorMapEncodeTiled") ? nullptr : reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = *entry ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Two multiprocessors: few enough for the loops of persistent kernels to go around on small sizes.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = 2;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = simt::device_malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (p) simt::device_free(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(p) + row * pitch, value, width);
  return cudaSuccess;
}
}
