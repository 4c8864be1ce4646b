// merge_attention_states at the torch boundary.
#include "torch/attention_cpu.h"
#ifdef SLKERNELS_WITH_CUDA
#include "torch/stream.h"
#endif

namespace slk {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // a few microseconds of memory traffic, the price of waking a thread

// Copies of the arguments where a kernel cannot take them as they are, and the kernel's view of them.
struct MergeInputs {
  Tensor o1, lse1, o2, lse2;
  MergeStates args = {};

  MergeInputs(const char* op, const Tensor& first, const Tensor& first_lse, const Tensor& second,
              const Tensor& second_lse) {
    const DType dtype = dtype_of(op, "o1", first);
    check(first.dim() == 4, op, "o1 must be [B, H, S, D], got ", show(first));
    check(shape_of(second) == shape_of(first), op, "o2 must be like o1 ", show(first), ", got ", show(second));
    check_same_dtype(op, "o2", second, "o1", first);
    check_same_device(op, "o2", second, "o1", first);
    o1 = contiguous_features(first);
    o2 = contiguous_features(second);
    args.batch = first.size(0), args.heads = first.size(1), args.tokens = first.size(2), args.features = first.size(3);
    args.dtype = dtype;
    lse1 = numbers(op, "lse1", first_lse);
    lse2 = numbers(op, "lse2", second_lse);
    args.o1 = o1.const_data_ptr(), args.o1_strides = head_strides(o1), args.lse1 = lse1.const_data_ptr();
    args.o2 = o2.const_data_ptr(), args.o2_strides = head_strides(o2), args.lse2 = lse2.const_data_ptr();
  }

  Tensor numbers(const char* op, const char* name, const Tensor& t) const {
    check(t.dim() == 3 && t.size(0) == args.batch && t.size(1) == args.heads && t.size(2) == args.tokens, op, name,
          " must be [", args.batch, ", ", args.heads, ", ", args.tokens, "], got ", show(t));
    check(t.scalar_type() == sum_type(args.dtype), op, name, " must be ", show(sum_type(args.dtype)), ", got ",
          show(t.scalar_type()));
    check_same_device(op, name, t, "o1", o1);
    return as_contiguous(t);
  }

  // Calls body(batch, head, tokens) for runs of tokens.
  template <class Body>
  void for_each_run(const Body& body) const {
    const int64_t heads = args.batch * args.heads, rows = heads * args.tokens;
    parallel_for(rows, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(args.features, 1)),
                 [&](int64_t begin, int64_t end) {
                   while (begin < end) {
                     const int64_t h = begin / args.tokens, last = std::min(end, (h + 1) * args.tokens);
                     body(h / args.heads, h % args.heads, Range{begin - h * args.tokens, last - h * args.tokens});
                     begin = last;
                   }
                 });
  }
};

#ifdef SLKERNELS_WITH_CUDA
// Launches on the current stream of the GPU that `like` is on.
template <class Launch>
void on_device_of(const char* op, const Tensor& like, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  check_cuda(op, launch(current_stream(op, like.get_device_index())));
}
#endif

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& o1, const Tensor& lse1, const Tensor& o2,
                                                  const Tensor& lse2) {
  const char* op = "merge_attention_states";
  MergeInputs in(op, o1, lse1, o2, lse2);
  const Tensor o = empty_in_order_of(o1, o1.size(3)), lse = empty_like_shape(in.lse1, shape_of(lse1));
  in.args.o = o.mutable_data_ptr(), in.args.o_strides = head_strides(o), in.args.lse = lse.mutable_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (o1.is_cuda()) {
    on_device_of(op, o1, [&](cudaStream_t stream) { return cuda::launch_merge_attention_states(in.args, stream); });
    return {o, lse};
  }
#endif
  const auto merge = attention_kernels_for(in.args.dtype).merge;
  in.for_each_run([&](int64_t b, int64_t h, Range tokens) { merge(in.args, b, h, tokens); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_states_backward(const Tensor& d_o,
                                                                           std::optional<Tensor> dlse, const Tensor& o1,
                                                                           const Tensor& lse1, const Tensor& o2,
                                                                           const Tensor& lse2) {
  const char* op = "merge_attention_states_backward";
  const MergeInputs in(op, o1, lse1, o2, lse2);
  check(shape_of(d_o) == shape_of(o1), op, "do must be like o1 ", show(o1), ", got ", show(d_o));
  check_same_dtype(op, "do", d_o, "o1", o1);
  check_same_device(op, "do", d_o, "o1", o1);
  const Tensor go = contiguous_features(d_o), gl = dlse ? in.numbers(op, "dlse", *dlse) : Tensor();
  const Tensor do1 = empty_in_order_of(o1, o1.size(3)), do2 = empty_in_order_of(o2, o2.size(3));
  const Tensor dlse1 = empty_like_shape(in.lse1, shape_of(lse1)), dlse2 = empty_like_shape(in.lse2, shape_of(lse2));
  const MergeStatesBackward args = {in.args,
                                    go.const_data_ptr(),
                                    dlse ? gl.const_data_ptr() : nullptr,
                                    head_strides(go),
                                    do1.mutable_data_ptr(),
                                    do2.mutable_data_ptr(),
                                    dlse1.mutable_data_ptr(),
                                    dlse2.mutable_data_ptr(),
                                    head_strides(do1),
                                    head_strides(do2)};
#ifdef SLKERNELS_WITH_CUDA
  if (o1.is_cuda()) {
    on_device_of(op, o1,
                 [&](cudaStream_t stream) { return cuda::launch_merge_attention_states_backward(args, stream); });
    return {do1, dlse1, do2, dlse2};
  }
#endif
  const auto merge_backward = attention_kernels_for(in.args.dtype).merge_backward;
  in.for_each_run([&](int64_t b, int64_t h, Range tokens) { merge_backward(args, b, h, tokens); });
  return {do1, dlse1, do2, dlse2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
  m.impl("merge_attention_states_backward", TORCH_BOX(&merge_attention_states_backward));
}

#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
  m.impl("merge_attention_states_backward", TORCH_BOX(&merge_attention_states_backward));
}
#endif

}  // namespace slk
