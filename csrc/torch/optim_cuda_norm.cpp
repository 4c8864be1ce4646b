// grad_norm_sq and clip_coef on CUDA at the torch boundary.
#ifdef SLKERNELS_WITH_CUDA
#include "slkernels/optim_cuda.h"
#include "slkernels/optim_norm.h"
#include "torch/optim.h"
#include "torch/stream.h"

namespace slk::optim {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor grad_norm_sq(Tensors grads) {
  constexpr const char* op = "grad_norm_sq";
  check(!grads.empty(), op, "grads must hold at least one tensor");
  std::vector<cuda::NormTensor> tensors(grads.size());
  int64_t chunks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!is_float(grads[i].scalar_type()))
      check(false, op, "grads[", i, "] must be float32, bfloat16 or float16, got ", show(grads[i].scalar_type()));
    check_same_device(op, "grads", grads[i], "grads[0]", grads[0]);
    if (!grads[i].is_contiguous()) grads[i] = torch::stable::contiguous(grads[i]);
    tensors[i] = {grads[i].const_data_ptr(), grads[i].numel(), dtype_of(op, "grads", grads[i])};
    chunks += ceil_div(grads[i].numel(), kNormChunk);
  }
  const int32_t device = grads[0].get_device_index();
  const DeviceGuard guard(device);
  const Tensor sums = empty_like_shape(grads[0], {chunks}, ScalarType::Double);
  Tensor out = empty_like_shape(grads[0], {}, ScalarType::Float);
  check_cuda(op, cuda::launch_grad_norm_sq(tensors.data(), int64_t(tensors.size()), sums.mutable_data_ptr<double>(),
                                           out.mutable_data_ptr<float>(), current_stream(op, device)));
  return out;
}

Tensor clip_coef(const Tensor& norm_sq, double max_norm) {
  constexpr const char* op = "clip_coef";
  check(norm_sq.scalar_type() == ScalarType::Float && norm_sq.numel() == 1, op,
        "norm_sq must be a float32 tensor with one element, got ", show(norm_sq.scalar_type()), " ", show(norm_sq));
  check(max_norm > 0, op, "max_norm must be positive, got ", max_norm);
  const int32_t device = norm_sq.get_device_index();
  const DeviceGuard guard(device);
  Tensor out = empty_like_shape(norm_sq, {}, ScalarType::Float);
  check_cuda(op, cuda::launch_clip_coef(norm_sq.const_data_ptr<float>(), float(max_norm), out.mutable_data_ptr<float>(),
                                        current_stream(op, device)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("grad_norm_sq", TORCH_BOX(&grad_norm_sq));
  m.impl("clip_coef", TORCH_BOX(&clip_coef));
}

}  // namespace slk::optim
#endif
