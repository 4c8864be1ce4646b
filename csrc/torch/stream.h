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

// Whether `kernel` ("auto", "sm80" or "sm90") is the sm_90a one on this device. Raises where the device cannot run it.
inline bool picks_sm90(const char* op, const std::string& kernel, int32_t device) {
  check(kernel == "auto" || kernel == "sm80" || kernel == "sm90", op, "kernel must be auto, sm80 or sm90, got ",
        kernel);
  const int capability = compute_capability(op, device);
  const auto found = [&] { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); };
  check(capability >= 80, op, "needs a GPU of compute capability 8.0 or newer, got ", found());
  check(kernel != "sm90" || capability == 90, op, "kernel sm90 needs a GPU of compute capability 9.0, got ", found());
  return kernel == "sm90" || (kernel == "auto" && capability == 90);
}

}  // namespace slk
