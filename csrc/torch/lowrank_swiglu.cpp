// SwiGLU over two low-rank products at the torch boundary: h = silu(gate) up, gate = alpha (x A_g^T) B_gate^T, up =
// alpha (x A_u^T) B_up^T, with A_g and A_u stacked in A.
#include "slkernels/lowrank.h"
#include "torch/lowrank.h"
#ifdef SLKERNELS_WITH_CUDA
#include "torch/stream.h"
#endif

namespace slk {
namespace {

constexpr const char* kOp = "lowrank_swiglu";
constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

SharedInput gate_and_up(const char* op, const Tensor& x, const Tensor& A, const Tensor& B_gate, const Tensor& B_up,
                        double alpha) {
  const SharedInput layer = {A, {B_gate, B_up}, {}, {}, {alpha, alpha}};
  check_shared_input(op, x, layer);
  check(B_gate.size(0) == B_up.size(0), op, "B_gate and B_up must have the same rows, got ", show(B_gate), " and ",
        show(B_up));
  return layer;
}

#ifdef SLKERNELS_WITH_CUDA
template <class Launch>
void on_stream_of(const char* op, const Tensor& t, Launch launch) {
  const int32_t device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(op, launch(current_stream(op, device)));
}
#endif

// gate becomes h.
void join(const Tensor& gate, const Tensor& up) {
  const DType dtype = dtype_of(kOp, "gate", gate);
  void* g = gate.mutable_data_ptr();
  const void* u = up.const_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (gate.is_cuda())
    return on_stream_of(kOp, gate,
                        [&](cudaStream_t stream) { return cuda::launch_swiglu(dtype, g, u, g, gate.numel(), stream); });
#endif
  parallel_for(gate.numel(), kGrain,
               [&](int64_t begin, int64_t end) { cpu::swiglu_kernels().forward(dtype, g, u, g, {begin, end}); });
}

// gate and up become their gradients.
void join_backward(const Tensor& dh, const Tensor& gate, const Tensor& up) {
  const DType dtype = dtype_of(kOp, "dh", dh);
  const Tensor incoming = as_contiguous(dh);
  const void* d = incoming.const_data_ptr();
  void *g = gate.mutable_data_ptr(), *u = up.mutable_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (gate.is_cuda())
    return on_stream_of(kOp, gate, [&](cudaStream_t stream) {
      return cuda::launch_swiglu_backward(dtype, d, g, u, gate.numel(), stream);
    });
#endif
  parallel_for(gate.numel(), kGrain,
               [&](int64_t begin, int64_t end) { cpu::swiglu_kernels().backward(dtype, d, g, u, {begin, end}); });
}

// (h, z): gate and up are computed again from z in backward, 2 r of z a token in place of their 2 n.
std::tuple<Tensor, Tensor> swiglu_forward(const Tensor& x, const Tensor& A, const Tensor& B_gate, const Tensor& B_up,
                                          double alpha) {
  const SharedInput layer = gate_and_up(kOp, x, A, B_gate, B_up, alpha);
  const Tensor x2 = as_tokens(kOp, "x", x, A.size(1)), z = linear(x2, A, 1, nullptr);
  const Tensors y = shared_forward(layer, x2, z);
  join(y[0], y[1]);
  Shape shape = shape_of(x);
  shape.back() = B_gate.size(0);
  return {torch::stable::view(y[0], {shape.data(), shape.size()}), z};
}

// Gradients of x, A, B_gate and B_up.
std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward(const Tensor& dh, const Tensor& x, const Tensor& A,
                                                           const Tensor& B_gate, const Tensor& B_up, const Tensor& z,
                                                           double alpha, bool need_x, bool need_a, bool need_b) {
  const char* op = "_lowrank_swiglu_backward";
  const SharedInput layer = gate_and_up(op, x, A, B_gate, B_up, alpha);
  const Tensor x2 = as_tokens(op, "x", x, A.size(1)), dh2 = as_tokens(op, "dh", dh, B_gate.size(0));
  const Tensors y = shared_forward(layer, x2, z);
  join_backward(dh2, y[0], y[1]);
  const SharedGradients grad = shared_backward(layer, y, x2, z, {need_x, need_a, need_b, false});
  const Tensor none = empty_like_shape(x, {0});
  const Shape shape = shape_of(x);
  return {need_x ? torch::stable::view(grad.x, {shape.data(), shape.size()}) : grad.x, grad.A,
          need_b ? grad.B[0] : none, need_b ? grad.B[1] : none};
}

// The public op: _lowrank_swiglu without z.
Tensor lowrank_swiglu(const Tensor& x, const Tensor& A, const Tensor& B_gate, const Tensor& B_up, double alpha) {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(x), from(A), from(B_gate), from(B_up), from(alpha)};
  call_op("slkernels::_lowrank_swiglu", stack);
  torch::stable::detail::to<Tensor>(stack[1]);  // releases z
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("_lowrank_swiglu", TORCH_BOX(&swiglu_forward));
  m.impl("_lowrank_swiglu_backward", TORCH_BOX(&swiglu_backward));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("_lowrank_swiglu", TORCH_BOX(&swiglu_forward));
  m.impl("_lowrank_swiglu_backward", TORCH_BOX(&swiglu_backward));
}
#endif
STABLE_TORCH_LIBRARY_IMPL(slkernels, CompositeImplicitAutograd, m) {
  m.impl("lowrank_swiglu", TORCH_BOX(&lowrank_swiglu));
}

}  // namespace slk
