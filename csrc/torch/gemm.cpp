// Family `gemm` at the torch boundary.
#ifdef SLKERNELS_WITH_CUDA
#include "torch/stream.h"
#endif
#include "slkernels/gemm.h"
#include "torch/gemm.h"

namespace slk {
namespace {

constexpr const char* kOp = "gemm";

void check_gemm(const Tensor& a, const Tensor& b, const std::string& kernel) {
  check(a.dim() == 2, kOp, "a must be [m, k], got ", show(a));
  check(b.dim() == 2 && b.size(1) == a.size(1), kOp, "b must be [n, ", a.size(1), "], got ", show(b));
  check(a.scalar_type() == ScalarType::BFloat16, kOp, "a must be bfloat16, got ", show(a.scalar_type()));
  check_same_dtype(kOp, "b", b, "a", a);
  check_same_device(kOp, "b", b, "a", a);
  check(kernel == "auto" || kernel == "sm80" || kernel == "sm90", kOp, "kernel must be auto, sm80 or sm90, got ",
        kernel);
}

Tensor gemm_cpu(const Tensor& a, const Tensor& b, Text kernel) {
  check_gemm(a, b, kernel);
  check(kernel == "auto", kOp, "kernel ", kernel, " needs CUDA tensors");
  const Tensor c = empty_like_shape(a, {a.size(0), b.size(0)});
  addmm_out(c, c, a, t2(b), 0, 1);
  return c;
}

#ifdef SLKERNELS_WITH_CUDA

Tensor gemm_cuda(const Tensor& a, const Tensor& b, Text kernel) {
  check_gemm(a, b, kernel);
  const int32_t device = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool hopper = picks_sm90(kOp, kernel, device);
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  const Tensor rows_a = with_aligned_rows(a), rows_b = with_aligned_rows(b);
  Tensor rows_c = empty_like_shape(a, {m, round_up(n, 8)});
  const cuda::GemmArgs args = {
      rows_a.const_data_ptr(), rows_b.const_data_ptr(), rows_c.mutable_data_ptr(), m, n, k, row_distance(rows_a),
      row_distance(rows_b),    round_up(n, 8)};
  const cudaStream_t stream = current_stream(kOp, device);
  check_cuda(kOp, hopper ? cuda::launch_gemm_sm90(args, stream) : cuda::launch_gemm_sm80(args, stream));
  return n % 8 ? torch::stable::contiguous(torch::stable::narrow(rows_c, 1, 0, n)) : rows_c;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm_cpu));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("gemm", TORCH_BOX(&gemm_cuda));
}
#endif

}  // namespace slk
