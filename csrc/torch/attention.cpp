// Block-sparse attention, forward and backward, at the torch boundary on the CPU.
#include "torch/attention_cpu.h"

namespace slk {
namespace {

// Unit i of `heads` heads of `blocks` blocks. Under a causal mask the last queries and the first keys see most: heavy
// units come first, so that the last one to end is a light one.
cpu::AttentionItem query_item(int64_t i, int64_t heads, int64_t blocks) {
  return {i / blocks / heads, i / blocks % heads, blocks - 1 - i % blocks};
}
cpu::AttentionItem key_item(int64_t i, int64_t heads, int64_t blocks) {
  return {i / blocks / heads, i / blocks % heads, i % blocks};
}

// ---- block_sparse_attention ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, SLK_LAYOUT_PARAMETERS,
                                     std::optional<double> scale, double softcap) {
  const char* op = "block_sparse_attention";
  LayoutTensors layout = SLK_LAYOUT_TENSORS;
  const AttentionInputs in = check_attention_inputs(op, q, k, v, scale, softcap);
  const AttentionShape& s = in.shape;
  const BlockRows mask = check_layout_tensors(op, in, layout);
  check_rows_inside(op, s, mask);
  const Tensor o = empty_in_order_of(q, s.dv), lse = empty_like_shape(q, {s.batch, s.heads_q, s.sq}, sum_type(s.dtype));
  const AttentionForward args = {s,
                                 mask,
                                 in.q.const_data_ptr(),
                                 in.k.const_data_ptr(),
                                 in.v.const_data_ptr(),
                                 head_strides(in.q),
                                 head_strides(in.k),
                                 head_strides(in.v),
                                 o.mutable_data_ptr(),
                                 head_strides(o),
                                 lse.mutable_data_ptr()};
  const cpu::AttentionKernels& kernels = attention_kernels_for(s.dtype);
  const int64_t blocks = mask.rows.blocks;
  for_each_item(s.batch * s.heads_q * blocks, kernels.scratch(s, mask),
                [&](int64_t i, float* scratch) { kernels.forward(args, query_item(i, s.heads_q, blocks), scratch); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_o, std::optional<Tensor> dlse, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& o,
                                                      const Tensor& lse, SLK_LAYOUT_PARAMETERS,
                                                      std::optional<double> scale, double softcap, bool need_q,
                                                      bool need_kv) {
  const char* op = "block_sparse_attention_backward";
  LayoutTensors layout = SLK_LAYOUT_TENSORS;
  const AttentionInputs in = check_attention_inputs(op, q, k, v, scale, softcap);
  const AttentionShape& s = in.shape;
  const BlockRows mask = check_layout_tensors(op, in, layout);
  check_has_gradients(op, mask);
  const BlockList cols = need_kv ? check_transposed_lists(op, in, mask, layout) : BlockList{};
  check_rows_inside(op, s, mask);
  if (need_kv)
    check_list_inside(op, "t", cols, mask.batches * mask.heads * cols.blocks, mask.block_m, s.sq, mask.bit_tiles);
  check_like_result(op, "do", d_o, in);
  check_like_result(op, "o", o, in);
  check_query_numbers(op, "lse", lse, in);
  if (dlse) check_query_numbers(op, "dlse", *dlse, in);

  const Tensor go = contiguous_features(d_o), out = contiguous_features(o), sums = as_contiguous(lse);
  const Tensor gl = dlse ? as_contiguous(*dlse) : Tensor(), delta = empty_like_shape(sums, shape_of(sums));
  const Tensor none = empty_like_shape(q, {0});
  const Tensor dq = need_q ? empty_in_order_of(q, s.dk) : none, dk = need_kv ? empty_in_order_of(k, s.dk) : none,
               dv = need_kv ? empty_in_order_of(v, s.dv) : none;
  const cpu::AttentionKernels& kernels = attention_kernels_for(s.dtype);
  AttentionBackward args = {};
  args.forward = {s,
                  mask,
                  in.q.const_data_ptr(),
                  in.k.const_data_ptr(),
                  in.v.const_data_ptr(),
                  head_strides(in.q),
                  head_strides(in.k),
                  head_strides(in.v),
                  out.mutable_data_ptr(),
                  head_strides(out),
                  sums.mutable_data_ptr()};
  args.cols = cols;
  args.d_o = go.const_data_ptr();
  args.d_o_strides = head_strides(go);
  args.dlse = dlse ? gl.const_data_ptr() : nullptr;
  args.delta = delta.mutable_data_ptr();
  if (need_q) args.dq = dq.mutable_data_ptr(), args.dq_strides = head_strides(dq);
  if (need_kv) {
    args.dk = dk.mutable_data_ptr(), args.dk_strides = head_strides(dk);
    args.dv = dv.mutable_data_ptr(), args.dv_strides = head_strides(dv);
  }

  const int64_t scratch_floats = kernels.scratch(s, mask), rows = mask.rows.blocks;
  const int64_t row_items = s.batch * s.heads_q * rows;
  for_each_item(row_items, scratch_floats,
                [&](int64_t i, float* scratch) { kernels.delta(args, query_item(i, s.heads_q, rows), scratch); });
  if (need_q)
    for_each_item(row_items, scratch_floats, [&](int64_t i, float* scratch) {
      kernels.backward_q(args, query_item(i, s.heads_q, rows), scratch);
    });
  if (need_kv)
    for_each_item(s.batch * s.heads_kv * cols.blocks, scratch_floats, [&](int64_t i, float* scratch) {
      kernels.backward_kv(args, key_item(i, s.heads_kv, cols.blocks), scratch);
    });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&attention));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace slk
