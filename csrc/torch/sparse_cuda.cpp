// Family `sparse` on CUDA: scratch, device and stream for the launchers. Shapes and dtypes were checked in sparse.cpp.
#ifdef SLKERNELS_WITH_CUDA
#include "torch/gemm.h"
#include "torch/stream.h"
#include "torch/support.h"

namespace slk::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// f(stream of t's device), on that device.
template <class F>
void on_stream_of(const char* op, const Tensor& t, F f) {
  const int32_t device = t.get_device_index();
  const DeviceGuard guard(device);
  check_cuda(op, f(current_stream(op, device)));
}

// x [T, m] as [m, padded_tokens(T)].
Tensor to_features(const char* op, const Tensor& x) {
  const Tensor out = empty_like_shape(x, {x.size(1), padded_tokens(x.size(0))});
  on_stream_of(op, x, [&](cudaStream_t stream) {
    return launch_to_features(dtype_of(op, "x", x), as_matrix(x), out.mutable_data_ptr(), stream);
  });
  return out;
}

}  // namespace

void spmm_into(const Csr& s, const Tensor& values, const Tensor& x, const Tensor& y, bool accumulate) {
  constexpr const char* op = "spmm";
  const DType dtype = dtype_of(op, "x", x);
  const Tensor v = as_contiguous(values);
  if (x.size(0) <= kFewTokens) {
    on_stream_of(op, x, [&](cudaStream_t stream) {
      return launch_spmm_few(dtype, s, v.const_data_ptr(), as_matrix(x), as_matrix(y), accumulate, stream);
    });
    return;
  }
  const Tensor xt = to_features(op, x);
  on_stream_of(op, x, [&](cudaStream_t stream) {
    return launch_spmm(dtype, s, v.const_data_ptr(), xt.const_data_ptr(), as_matrix(y), accumulate, stream);
  });
}

TransposedCsr transposed(const Csr& s, const Tensor& crow, const Tensor& values) {
  constexpr const char* op = "spmm_t";
  const bool narrow = s.n <= 32768;
  TransposedCsr t = {empty_like_shape(crow, {s.m + 1}),
                     empty_like_shape(crow, {s.nnz}, narrow ? ScalarType::Short : ScalarType::Int),
                     empty_like_shape(values, {s.nnz}),
                     {}};
  const Tensor v = as_contiguous(values), scratch = empty_like_shape(crow, {transpose_scratch(s)});
  int32_t* crow_t = t.crow.mutable_data_ptr<int32_t>();
  on_stream_of(op, values, [&](cudaStream_t stream) {
    return launch_transpose_csr(dtype_of(op, "values", values), s, v.const_data_ptr(), crow_t, t.row.mutable_data_ptr(),
                                t.values.mutable_data_ptr(), scratch.mutable_data_ptr<int32_t>(), stream);
  });
  t.csr = {crow_t, t.row.const_data_ptr(), narrow, s.m, s.n, s.nnz};
  return t;
}

Tensor sddmm_at(const Csr& s, const Tensor& dy, const Tensor& x) {
  constexpr const char* op = "sddmm";
  Tensor out = empty_like_shape(x, {s.nnz});
  const Tensor dyt = to_features(op, dy), xt = to_features(op, x);
  on_stream_of(op, x, [&](cudaStream_t stream) {
    return launch_sddmm(dtype_of(op, "x", x), s, dyt.const_data_ptr(), xt.const_data_ptr(), x.size(0),
                        out.mutable_data_ptr(), stream);
  });
  return out;
}

Tensor gather_at(const Csr& s, const Tensor& w) {
  constexpr const char* op = "gather_support";
  Tensor out = empty_like_shape(w, {s.nnz});
  on_stream_of(op, w, [&](cudaStream_t stream) {
    return launch_gather(dtype_of(op, "w", w), s, w.const_data_ptr(), w.stride(0), out.mutable_data_ptr(), stream);
  });
  return out;
}

void scatter_add(const Csr& s, const Tensor& values, const Tensor& w) {
  constexpr const char* op = "compose";
  const Tensor v = as_contiguous(values);
  on_stream_of(op, w, [&](cudaStream_t stream) {
    return launch_scatter_add(dtype_of(op, "values", values), s, v.const_data_ptr(), w.mutable_data_ptr(), w.stride(0),
                              stream);
  });
}

namespace {

// compose by the tensor-core kernel that adds S in its epilogue, in place of cuBLAS and scatter_add: bf16, even rows of
// W.
Tensor compose_tile(const Tensor& values, const Tensor& crow, const Tensor& col, int64_t m, const Tensor& A,
                    const Tensor& B, double alpha, Text kernel) {
  constexpr const char* op = "_compose_tile";
  check(crow.dim() == 1 && crow.size(0) >= 1, op, "crow must be [n + 1], got ", show(crow));
  const int64_t n = crow.size(0) - 1;
  check_same_device(op, "crow", crow, "values", values);
  const Csr s = as_csr(op, crow, col, n, m, false);
  check(values.dim() == 1 && values.size(0) == s.nnz, op, "values must be [", s.nnz, "], got ", show(values));
  check(values.scalar_type() == ScalarType::BFloat16, op, "values must be bfloat16, got ", show(values.scalar_type()));
  check(m % 8 == 0, op, "m must be a multiple of 8, got ", m);
  check_lowrank(op, A, B, n, m, "values", values);
  const int64_t rank = A.size(0);
  const Tensor v = as_contiguous(values), b = with_aligned_rows(B), at = to_features(op, as_tokens(op, "A", A, m));
  const Tensor w = empty_like_shape(values, {n, m});
  const GemmArgs args = {b.const_data_ptr(),
                         at.const_data_ptr(),
                         w.mutable_data_ptr(),
                         n,
                         m,
                         rank,
                         row_distance(b),
                         padded_tokens(rank),
                         m};
  const bool hopper = picks_sm90(op, kernel, w.get_device_index());
  check(!hopper || rank > 0, op, "rank must be at least 1");
  on_stream_of(op, w, [&](cudaStream_t stream) {
    return (hopper ? launch_compose_sm90 : launch_compose_sm80)(args, s, v.const_data_ptr(), float(alpha), stream);
  });
  return w;
}

}  // namespace

}  // namespace slk::cuda

namespace slk {
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("_compose_tile", TORCH_BOX(&cuda::compose_tile));
}
}  // namespace slk
#endif
