// The current CUDA stream through the stable ABI.
#pragma once

#include <cuda_runtime.h>

#include "torch/tensor.h"

// Lives in libtorch_cuda only. Weak, so that one binary loads in CPU-only torch, where it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace slk {

inline void check_torch_has_cuda(const char* op) {
  check(aoti_torch_get_current_cuda_stream != nullptr, op, "this PyTorch build has no CUDA support");
}

inline cudaStream_t current_stream(const char* op, int32_t device) {
  check_torch_has_cuda(op);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, "CUDA error: ", cudaGetErrorString(error));
}

// 80 for compute capability 8.0.
inline int compute_capability(const char* op, int32_t device) {
  int major = 0, minor = 0;
  check_cuda(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

}  // namespace slk
