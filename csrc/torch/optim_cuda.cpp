// Family `optim` on CUDA at the torch boundary: devices, the current stream, what the CPU's checks have left to do.
#ifdef SLKERNELS_WITH_CUDA
#include "torch/optim_cuda.h"

#include "slkernels/optim_cuda.h"
#include "torch/stream.h"

namespace slk::optim {
namespace {

using torch::stable::accelerator::DeviceGuard;

// `like` is a CUDA tensor.
void check_on(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (!(t.device() == like.device())) check(false, op, name, " must be on device cuda:", like.get_device_index());
}

// A device scalar that the kernel reads.
const float* scalar_pointer(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& like) {
  if (!t) return nullptr;
  check(t->numel() == 1 && t->scalar_type() == ScalarType::Float, op, name,
        " must be a float32 tensor with one element, got ", show(t->scalar_type()), " ", show(*t));
  check_on(op, name, *t, like);
  return t->const_data_ptr<float>();
}

const int64_t* random_pointer(const char* op, int64_t round_mode, const std::optional<Tensor>& rng,
                              const Tensor& like) {
  if (round_mode == 0) return nullptr;
  check_on(op, "rng", *rng, like);
  return rng->const_data_ptr<int64_t>();
}

}  // namespace

void quantize_cuda(const char* op, Codec codec, DType dtype, const Tensor& x, int64_t block, int64_t round_mode,
                   const std::optional<Tensor>& rng, const Tensor& codes, const Tensor& scale) {
  const DeviceGuard guard(x.get_device_index());
  check_cuda(op, cuda::launch_quantize(
                     {codec, dtype, x.const_data_ptr(), x.numel(), int(block), random_pointer(op, round_mode, rng, x),
                      codes.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>()},
                     current_stream(op, x.get_device_index())));
}

void dequantize_cuda(const char* op, Codec codec, DType dtype, const Tensor& codes, const Tensor& scale, int64_t block,
                     const Tensor& out) {
  const DeviceGuard guard(codes.get_device_index());
  check_cuda(op, cuda::launch_dequantize({codec, dtype, codes.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(),
                                          out.numel(), int(block), out.mutable_data_ptr()},
                                         current_stream(op, codes.get_device_index())));
}

void check_on_cuda(const StepLists& lists, const Tensor& step) {
  const auto check_list = [&](const char* name, const Tensors& list) {
    for (const Tensor& t : list) check_on(lists.op, name, t, step);
  };
  check(on_cuda(step), lists.op, "step must be on the device of the tensors");
  check_list(lists.direction ? "out" : "params", lists.params);
  check_list("grads", lists.grads);
  for (const MomentList& list : lists.moments) {
    check_list(list.name, list.state);
    check_list(list.scale_name, list.scale);
  }
  check_list("master_lo", lists.master_lo);
}

void run_step_cuda(const char* op, const std::vector<cpu::StepTensor>& tensors, const StepTensors& in,
                   const StepOptions& options, Codec codec, int64_t block) {
  const Tensor& step = *in.step;
  const auto optional = [](const Tensor* t) { return t ? std::optional<Tensor>(*t) : std::nullopt; };
  cuda::StepArgs args = {};
  args.options = options;
  args.codec = codec;
  args.block = int(block);
  args.step = scalar_pointer(op, "step", step, step);
  args.lr = scalar_pointer(op, "lr", optional(in.lr), step);
  args.beta3 = scalar_pointer(op, "beta3", optional(in.beta3), step);
  args.alpha = scalar_pointer(op, "alpha", optional(in.alpha), step);
  args.grad_scale = scalar_pointer(op, "grad_scale", in.grad_scale, step);
  args.found_inf = scalar_pointer(op, "found_inf", in.found_inf, step);
  args.random = random_pointer(op, in.round_mode, in.rng, step);
  if (in.nonfinite) {
    check_on(op, "nonfinite", *in.nonfinite, step);
    args.nonfinite = in.nonfinite->mutable_data_ptr<int64_t>();
  }
  const DeviceGuard guard(step.get_device_index());
  check_cuda(op, cuda::launch_step(tensors.data(), int64_t(tensors.size()), args,
                                   current_stream(op, step.get_device_index())));
}

}  // namespace slk::optim
#endif
