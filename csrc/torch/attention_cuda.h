// Block-sparse attention at the torch boundary: what its ops share on CUDA.
#pragma once

#include "torch/attention.h"
#include "torch/stream.h"

namespace slk {

// The kernels copy 16 bytes at a time.
inline bool is_aligned(const Tensor& t) {
  bool aligned = t.size(3) % 8 == 0 && t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) aligned &= t.size(d) <= 1 || (t.stride(d) > 0 && t.stride(d) % 8 == 0);
  return aligned;
}
// The tensor itself, or a copy with features up to a multiple of 8, zeros behind the tensor's own.
inline Tensor with_aligned_heads(const Tensor& t) {
  if (is_aligned(t)) return t;
  Tensor padded = empty_in_order_of(t, round_up(t.size(3), 8));
  if (t.size(3) % 8) torch::stable::zero_(padded);
  Tensor own = torch::stable::narrow(padded, 3, 0, t.size(3));
  torch::stable::copy_(own, t);
  return padded;
}
// A dimension of one element may have any stride in torch; nobody steps along it.
inline HeadStrides aligned_strides(const Tensor& t) {
  const auto stride = [&](int64_t d) { return t.size(d) <= 1 ? int64_t(8) : t.stride(d); };
  return {stride(0), stride(1), stride(2)};
}

// bf16 and f16, heads and a device that the kernels are made for.
inline int check_attention_device(const char* op, const AttentionInputs& in) {
  const AttentionShape& s = in.shape;
  check(s.dtype == DType::bf16 || s.dtype == DType::f16, op, "q must be bfloat16 or float16 on CUDA, got ",
        show(in.q.scalar_type()));
  check(s.dk <= 256 && s.dv <= 256, op, "heads on CUDA have at most 256 features, got ", s.dk, " (q, k) and ", s.dv,
        " (v)");
  const int capability = compute_capability(op, in.q.get_device_index());
  check(capability >= 80, op, "needs a GPU of compute capability 8.0 or newer, got ", capability / 10, ".",
        capability % 10);
  return capability;
}

}  // namespace slk
