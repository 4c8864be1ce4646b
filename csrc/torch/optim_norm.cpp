// grad_norm_sq and clip_coef at the torch boundary: checks, and threads over the chunks of all tensors as one list.
#include "slkernels/optim_norm.h"

#include <algorithm>

#include "torch/tensor.h"

namespace slk {
namespace {

Tensor grad_norm_sq(std::vector<Tensor> grads) {
  constexpr const char* op = "grad_norm_sq";
  check(!grads.empty(), op, "grads must hold at least one tensor");
  const size_t count = grads.size();
  std::vector<int64_t> first(count + 1, 0);  // the first chunk of each tensor in the flattened list
  std::vector<const void*> data(count);
  std::vector<DType> types(count);
  for (size_t i = 0; i < count; ++i) {
    const ScalarType type = grads[i].scalar_type();
    if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half)
      check(false, op, "grads[", i, "] must be float32, bfloat16 or float16, got ", show(type));
    if (!grads[i].is_contiguous()) grads[i] = torch::stable::contiguous(grads[i]);
    types[i] = dtype_of(op, "grads", grads[i]);
    data[i] = grads[i].const_data_ptr();
    first[i + 1] = first[i] + ceil_div(grads[i].numel(), kNormChunk);
  }
  std::vector<double> sums(first.back());
  parallel_for(first.back(), 1, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++begin) {
      while (begin >= first[i + 1]) ++i;
      const int64_t start = (begin - first[i]) * kNormChunk;
      const int64_t bytes = types[i] == DType::f32 ? 4 : 2;
      sums[begin] = cpu::norm_kernels().sum_of_squares(types[i], static_cast<const char*>(data[i]) + start * bytes,
                                                       std::min(kNormChunk, grads[i].numel() - start));
    }
  });
  Tensor out = empty_like_shape(grads[0], {}, ScalarType::Float);
  *out.mutable_data_ptr<float>() = float(add_norm_chunks(sums.data(), int64_t(sums.size())));
  return out;
}

Tensor clip_coef(const Tensor& norm_sq, double max_norm) {
  constexpr const char* op = "clip_coef";
  check(norm_sq.scalar_type() == ScalarType::Float && norm_sq.numel() == 1, op,
        "norm_sq must be a float32 tensor with one element, got ", show(norm_sq.scalar_type()), " ", show(norm_sq));
  check(max_norm > 0, op, "max_norm must be positive, got ", max_norm);
  Tensor out = empty_like_shape(norm_sq, {}, ScalarType::Float);
  *out.mutable_data_ptr<float>() = clip_divisor(*norm_sq.const_data_ptr<float>(), float(max_norm));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("grad_norm_sq", TORCH_BOX(&grad_norm_sq));
  m.impl("clip_coef", TORCH_BOX(&clip_coef));
}

}  // namespace slk
