// Code that serves tensors of either device.
#pragma once

#include <optional>

#include "torch/tensor.h"
#ifdef SLKERNELS_WITH_CUDA
#include "torch/stream.h"

// Lives in libtorch_cuda only, hence weak (see stream.h).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                                          AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                                          double beta, double alpha);
#endif

namespace slk {

inline bool is_cuda(const Tensor& t) {
  return t.device().type() == torch::headeronly::DeviceType::CUDA;
}

// Makes t's device the current one while it lives, if that is a GPU.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) {
    if (is_cuda(t)) guard_.emplace(t.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace slk
