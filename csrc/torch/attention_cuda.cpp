// Block-sparse attention, forward and backward, at the torch boundary on CUDA. Nothing here waits for the device: what
// a layout holds is not looked at, and the kernels leave out what a corrupt one names outside.
#ifdef SLKERNELS_WITH_CUDA
#include "torch/attention_cuda.h"

namespace slk {
namespace {

// What the kernels write a result into, and the result, in the order of `like`, that it becomes.
Tensor empty_result(const Tensor& like, int64_t features) {
  return empty_in_order_of(like, round_up(features, 8));
}
Tensor as_result(Tensor written, const Tensor& like, int64_t features) {
  if (written.size(3) == features) return written;
  Tensor result = empty_in_order_of(like, features);
  torch::stable::copy_(result, torch::stable::narrow(written, 3, 0, features));
  return result;
}

// q, k and v as the kernels take them.
struct DeviceInputs {
  Tensor q, k, v;
  bool hopper;
  AttentionForward args = {};  // but for o and lse

  DeviceInputs(const char* op, const AttentionInputs& in, const BlockRows& mask)
      : q(with_aligned_heads(in.q)), k(with_aligned_heads(in.k)), v(with_aligned_heads(in.v)) {
    const AttentionShape& s = in.shape;
    hopper = check_attention_device(op, in) == 90;
    args.shape = s;
    args.shape.dk = q.size(3);
    args.shape.dv = v.size(3);
    args.mask = mask;
    args.q = q.const_data_ptr();
    args.k = k.const_data_ptr();
    args.v = v.const_data_ptr();
    args.q_strides = aligned_strides(q);
    args.k_strides = aligned_strides(k);
    args.v_strides = aligned_strides(v);
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, SLK_LAYOUT_PARAMETERS,
                                     std::optional<double> scale, double softcap) {
  const char* op = "block_sparse_attention";
  LayoutTensors layout = SLK_LAYOUT_TENSORS;
  const AttentionInputs in = check_attention_inputs(op, q, k, v, scale, softcap);
  const BlockRows mask = check_layout_tensors(op, in, layout);
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  DeviceInputs inputs(op, in, mask);
  const AttentionShape& s = in.shape;
  const Tensor o = empty_result(q, s.dv), lse = empty_like_shape(q, {s.batch, s.heads_q, s.sq}, sum_type(s.dtype));
  AttentionForward& args = inputs.args;
  args.o = o.mutable_data_ptr();
  args.o_strides = aligned_strides(o);
  args.lse = lse.mutable_data_ptr();
  const cudaStream_t stream = current_stream(op, device);
  check_cuda(op, inputs.hopper ? cuda::launch_attention_forward_sm90(args, stream)
                               : cuda::launch_attention_forward_sm80(args, stream));
  return {as_result(o, q, s.dv), lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_o, std::optional<Tensor> dlse, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& o,
                                                      const Tensor& lse, SLK_LAYOUT_PARAMETERS,
                                                      std::optional<double> scale, double softcap, bool need_q,
                                                      bool need_kv) {
  const char* op = "block_sparse_attention_backward";
  LayoutTensors layout = SLK_LAYOUT_TENSORS;
  const AttentionInputs in = check_attention_inputs(op, q, k, v, scale, softcap);
  const BlockRows mask = check_layout_tensors(op, in, layout);
  check_has_gradients(op, mask);
  const BlockList cols = need_kv ? check_transposed_lists(op, in, mask, layout) : BlockList{};
  check_like_result(op, "do", d_o, in);
  check_like_result(op, "o", o, in);
  check_query_numbers(op, "lse", lse, in);
  if (dlse) check_query_numbers(op, "dlse", *dlse, in);

  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  DeviceInputs inputs(op, in, mask);
  const AttentionShape& s = in.shape;
  const Tensor go = with_aligned_heads(d_o), out = with_aligned_heads(o), sums = as_contiguous(lse);
  const Tensor gl = dlse ? as_contiguous(*dlse) : Tensor(), delta = empty_like_shape(sums, shape_of(sums));
  const Tensor none = empty_like_shape(q, {0});
  const Tensor dq = need_q ? empty_result(q, s.dk) : none, dk = need_kv ? empty_result(k, s.dk) : none,
               dv = need_kv ? empty_result(v, s.dv) : none;
  AttentionBackward args = {};
  args.forward = inputs.args;
  args.forward.o = const_cast<void*>(out.const_data_ptr());
  args.forward.o_strides = aligned_strides(out);
  args.forward.lse = const_cast<void*>(sums.const_data_ptr());
  args.cols = cols;
  args.d_o = go.const_data_ptr();
  args.d_o_strides = aligned_strides(go);
  args.dlse = dlse ? gl.const_data_ptr() : nullptr;
  args.delta = delta.mutable_data_ptr();
  if (need_q) args.dq = dq.mutable_data_ptr(), args.dq_strides = aligned_strides(dq);
  if (need_kv) {
    args.dk = dk.mutable_data_ptr(), args.dk_strides = aligned_strides(dk);
    args.dv = dv.mutable_data_ptr(), args.dv_strides = aligned_strides(dv);
  }
  const cudaStream_t stream = current_stream(op, device);
  check_cuda(op, inputs.hopper ? cuda::launch_attention_backward_sm90(args, stream)
                               : cuda::launch_attention_backward_sm80(args, stream));
  return {need_q ? as_result(dq, q, s.dk) : none, need_kv ? as_result(dk, k, s.dk) : none,
          need_kv ? as_result(dv, v, s.dv) : none};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&attention));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace slk
#endif
