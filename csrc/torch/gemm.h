// Operands of the tensor-core kernels at the torch boundary.
#pragma once

#include "torch/tensor.h"

namespace slk {

// Row-major with rows that start at multiples of 16 bytes, as the kernels read them: the tensor itself, or a copy with
// rows padded to a multiple of 8 elements.
inline Tensor with_aligned_rows(const Tensor& t) {
  const bool unit = t.stride(1) == 1 || t.size(1) <= 1;
  const bool rows = t.size(0) <= 1 || (t.stride(0) % 8 == 0 && t.stride(0) >= t.size(1));
  if (unit && rows && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
  Tensor padded = empty_like_shape(t, {t.size(0), round_up(t.size(1), 8)});
  Tensor view = torch::stable::narrow(padded, 1, 0, t.size(1));
  torch::stable::copy_(view, t);
  return view;
}
// A single row has no distance to the next: torch may give any stride, the kernels ask for an aligned one.
inline int64_t row_distance(const Tensor& t) {
  return t.size(0) <= 1 ? round_up(t.size(1), 8) : t.stride(0);
}

}  // namespace slk
