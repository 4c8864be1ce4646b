// Learned 2:4 masks at the torch boundary, on both devices. Contract: slkernels/semi24_mask.h.
#include "slkernels/semi24_mask.h"

#include <algorithm>

#include "torch/device.h"

namespace slk {
namespace {

constexpr int64_t kGrainGroups = 1024;     // some 20 us of arithmetic
constexpr int64_t kGrainElements = 32768;  // of kernels that are bound by memory

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_gate(const char* op, const Tensor& gate, int64_t n, int64_t m) {
  check(gate.dim() == 3 && gate.size(0) == n && gate.size(1) == groups24(m) && gate.size(2) == kCodes24, op,
        "gate must be [", n, ", ", groups24(m), ", 6], got ", show(gate));
}

void check_scalar(const char* op, const char* name, const Tensor& t, ScalarType type, const Tensor& W) {
  check(t.numel() == 1 && t.scalar_type() == type, op, name, " must be ", show(type), " with one element, got ",
        show(t.scalar_type()), " ", show(t));
  check_same_device(op, name, t, "W", W);
}

// The arguments of maskllm24 and of its backward: checked, contiguous.
struct SoftMaskCall {
  Tensor W, gate, kappa, tau, seed;
  GatedWeight24 x;

  SoftMaskCall(const char* op, const Tensor& weight, const Tensor& gates, const Tensor& kappa, const Tensor& tau,
               const Tensor& seed)
      : W(weight), gate(gates), kappa(kappa), tau(tau), seed(seed) {
    check(W.dim() == 2, op, "W must be [n, m], got ", show(W));
    x.type = dtype_of(op, "W", W);
    x.n = W.size(0);
    x.m = W.size(1);
    check_gate(op, gate, x.n, x.m);
    x.gate_type = dtype_of(op, "gate", gate);
    check((x.type == DType::f64) == (x.gate_type == DType::f64), op,
          "gate must be float64 if and only if W is, got gate ", show(gate.scalar_type()), " and W ",
          show(W.scalar_type()));
    check_same_device(op, "gate", gate, "W", W);
    check_scalar(op, "kappa", kappa, ScalarType::Float, W);
    check_scalar(op, "tau", tau, ScalarType::Float, W);
    check_scalar(op, "seed", seed, ScalarType::Long, W);
    W = as_contiguous(W);
    gate = as_contiguous(gate);
    x.w = W.const_data_ptr();
    x.gate = gate.const_data_ptr();
  }

  cpu::SoftMask24 on_host() const {
    return {*kappa.const_data_ptr<float>(), *tau.const_data_ptr<float>(), uint64_t(*seed.const_data_ptr<int64_t>())};
  }
#ifdef SLKERNELS_WITH_CUDA
  cuda::SoftMask24 on_device() const {
    return {kappa.const_data_ptr<float>(), tau.const_data_ptr<float>(), seed.const_data_ptr<int64_t>()};
  }
#endif
};

// ---- maskllm24 ------------------------------------------------------------------------------------------------------

Tensor maskllm24(const Tensor& W, const Tensor& gate, const Tensor& kappa, const Tensor& tau, const Tensor& seed) {
  constexpr const char* op = "maskllm24";
  const SoftMaskCall call(op, W, gate, kappa, tau, seed);
  const DeviceScope scope(W);
  Tensor y = empty_like_shape(W, shape_of(W));
  if (y.numel() == 0) return y;
  void* out = y.mutable_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(W)) {
    check_cuda(op, cuda::launch_soft_mask24(call.x, call.on_device(), out, current_stream(op, W.get_device_index())));
    return y;
  }
#endif
  const cpu::SoftMask24 mask = call.on_host();
  parallel_for(call.x.groups(), kGrainGroups, [&](int64_t begin, int64_t end) {
    if (call.x.type == DType::f64)
      cpu::soft_mask_f64(call.x, mask, {begin, end}, static_cast<double*>(out));
    else
      cpu::mask_kernels().soft_mask(call.x, mask, {begin, end}, out);
  });
  return y;
}

// (d gate, dW); one that is not asked for is empty.
std::tuple<Tensor, Tensor> maskllm24_backward(const Tensor& dY, const Tensor& W, const Tensor& gate,
                                              const Tensor& kappa, const Tensor& tau, const Tensor& seed,
                                              bool need_gate, bool need_W) {
  constexpr const char* op = "maskllm24_backward";
  const SoftMaskCall call(op, W, gate, kappa, tau, seed);
  check(shape_of(dY) == shape_of(W), op, "dY must be ", show(W), ", got ", show(dY));
  check_same_dtype(op, "dY", dY, "W", W);
  check_same_device(op, "dY", dY, "W", W);
  const DeviceScope scope(W);
  const Tensor cotangent = as_contiguous(dY);
  Tensor dgate = empty_like_shape(gate, need_gate ? shape_of(gate) : Shape{0});
  Tensor dW = empty_like_shape(W, need_W ? shape_of(W) : Shape{0});
  if (W.numel() == 0 || !(need_gate || need_W)) return {dgate, dW};
  const void* dy = cotangent.const_data_ptr();
  void* to_gate = need_gate ? dgate.mutable_data_ptr() : nullptr;
  void* to_w = need_W ? dW.mutable_data_ptr() : nullptr;
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(W)) {
    check_cuda(op, cuda::launch_soft_mask24_backward(call.x, call.on_device(), dy, to_gate, to_w,
                                                     current_stream(op, W.get_device_index())));
    return {dgate, dW};
  }
#endif
  const cpu::SoftMask24 mask = call.on_host();
  parallel_for(call.x.groups(), kGrainGroups, [&](int64_t begin, int64_t end) {
    if (call.x.type == DType::f64)
      cpu::soft_mask_backward_f64(call.x, mask, static_cast<const double*>(dy), {begin, end},
                                  static_cast<double*>(to_gate), static_cast<double*>(to_w));
    else
      cpu::mask_kernels().soft_mask_backward(call.x, mask, dy, {begin, end}, to_gate, to_w);
  });
  return {dgate, dW};
}

// ---- gate_to_mask ---------------------------------------------------------------------------------------------------

Tensor gate_to_mask(const Tensor& gate, int64_t m) {
  constexpr const char* op = "gate_to_mask";
  check(m >= 0, op, "m must not be negative, got ", m);
  check(gate.dim() == 3, op, "gate must be [n, ", groups24(m), ", 6], got ", show(gate));
  const int64_t n = gate.size(0);
  check_gate(op, gate, n, m);
  const DType type = dtype_of(op, "gate", gate);
  const DeviceScope scope(gate);
  const Tensor from = as_contiguous(gate);
  Tensor mask = empty_like_shape(gate, {n, m}, ScalarType::Bool);
  if (mask.numel() == 0) return mask;
  uint8_t* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const void* data = from.const_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(gate)) {
    check_cuda(op, cuda::launch_gate_to_mask24(type, data, n, m, out, current_stream(op, gate.get_device_index())));
    return mask;
  }
#endif
  parallel_for(n * groups24(m), kGrainElements / 4, [&](int64_t begin, int64_t end) {
    if (type == DType::f64)
      cpu::gate_to_mask_f64(static_cast<const double*>(data), m, {begin, end}, out);
    else
      cpu::mask_kernels().gate_to_mask(type, data, m, {begin, end}, out);
  });
  return mask;
}

// ---- srste_grad_ ----------------------------------------------------------------------------------------------------

void srste_grad_(const Tensor& grad, const Tensor& W, const Tensor& mask, double lam) {
  constexpr const char* op = "srste_grad_";
  const DType type = dtype_of(op, "grad", grad);
  check(grad.is_contiguous(), op, "grad must be contiguous");
  check(shape_of(W) == shape_of(grad), op, "W must be ", show(grad), ", got ", show(W));
  check_same_dtype(op, "W", W, "grad", grad);
  check_same_device(op, "W", W, "grad", grad);
  check(mask.scalar_type() == ScalarType::Bool && shape_of(mask) == shape_of(grad), op, "mask must be bool ",
        show(grad), ", got ", show(mask.scalar_type()), " ", show(mask));
  check_same_device(op, "mask", mask, "grad", grad);
  if (grad.numel() == 0) return;
  const DeviceScope scope(grad);
  const Tensor weight = as_contiguous(W), kept = as_contiguous(mask);
  const void* w = weight.const_data_ptr();
  const uint8_t* keep = static_cast<const uint8_t*>(kept.const_data_ptr());
  void* to = grad.mutable_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(grad)) {
    check_cuda(
        op, cuda::launch_srste_grad(type, w, keep, lam, grad.numel(), to, current_stream(op, grad.get_device_index())));
    return;
  }
#endif
  parallel_for(grad.numel(), kGrainElements, [&](int64_t begin, int64_t end) {
    if (type == DType::f64)
      cpu::srste_grad_f64(static_cast<const double*>(w), keep, lam, {begin, end}, static_cast<double*>(to));
    else
      cpu::mask_kernels().srste_grad(type, w, keep, float(lam), {begin, end}, to);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("maskllm24", TORCH_BOX(&maskllm24));
  m.impl("maskllm24_backward", TORCH_BOX(&maskllm24_backward));
  m.impl("gate_to_mask", TORCH_BOX(&gate_to_mask));
  m.impl("srste_grad_", TORCH_BOX(&srste_grad_));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("maskllm24", TORCH_BOX(&maskllm24));
  m.impl("maskllm24_backward", TORCH_BOX(&maskllm24_backward));
  m.impl("gate_to_mask", TORCH_BOX(&gate_to_mask));
  m.impl("srste_grad_", TORCH_BOX(&srste_grad_));
}
#endif

}  // namespace slk
