// What the family's CPU boundary calls for tensors on a GPU, after its own checks.
#pragma once

#include "torch/optim_step.h"

namespace slk::optim {

inline bool on_cuda(const Tensor& t) {
  return t.device().type() == torch::headeronly::DeviceType::CUDA;
}

// The kernels of all step ops. `tensors` are as run_step has checked them.
void run_step_cuda(const char* op, const std::vector<cpu::StepTensor>& tensors, const StepTensors&, const StepOptions&,
                   Codec, int64_t block);
// Every tensor of the lists lies on the device of `step`.
void check_on_cuda(const StepLists&, const Tensor& step);

void quantize_cuda(const char* op, Codec, DType, const Tensor& x, int64_t block, int64_t round_mode,
                   const std::optional<Tensor>& rng, const Tensor& codes, const Tensor& scale);
void dequantize_cuda(const char* op, Codec, DType, const Tensor& codes, const Tensor& scale, int64_t block,
                     const Tensor& out);

#ifndef SLKERNELS_WITH_CUDA  // nothing sends a CUDA tensor here: only the CPU's implementations are registered
inline void run_step_cuda(const char*, const std::vector<cpu::StepTensor>&, const StepTensors&, const StepOptions&,
                          Codec, int64_t) {}
inline void check_on_cuda(const StepLists&, const Tensor&) {}
inline void quantize_cuda(const char*, Codec, DType, const Tensor&, int64_t, int64_t, const std::optional<Tensor>&,
                          const Tensor&, const Tensor&) {}
inline void dequantize_cuda(const char*, Codec, DType, const Tensor&, const Tensor&, int64_t, const Tensor&) {}
#endif

}  // namespace slk::optim
