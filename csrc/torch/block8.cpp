// Family `block8` at the torch boundary.
#include "slkernels/block8.h"

#include <numeric>

#include "torch/panels.h"
#ifdef SLKERNELS_WITH_CUDA
#include "torch/gemm.h"
#include "torch/stream.h"
#endif

namespace slk {
namespace {

constexpr int64_t kSide = 8, kBlock = kSide * kSide;

Csr grid_of(const char* op, const Tensor& crow, const Tensor& col, int64_t n, int64_t m, bool validate) {
  return as_csr(op, crow, col, ceil_div(n, kSide), ceil_div(m, kSide), validate);
}

void check_values(const char* op, const Tensor& values, const Csr& grid, const Tensor& x, const char* x_name) {
  check(values.dim() == 3 && values.size(0) == grid.nnz && values.size(1) == kSide && values.size(2) == kSide, op,
        "values must be [", grid.nnz, ", 8, 8], got ", show(values));
  check_same_dtype(op, "values", values, x_name, x);
  check_same_device(op, "values", values, x_name, x);
}

// The list of S^T, and the tensors that own its arrays.
struct TransposedList {
  Tensor crow, row, order;
  Blocks blocks;
};

TransposedList transposed_list(const Csr& grid, const Tensor& crow) {
  const bool narrow = grid.n <= 32768;
  TransposedList t = {empty_like_shape(crow, {grid.m + 1}),
                      empty_like_shape(crow, {grid.nnz}, narrow ? ScalarType::Short : ScalarType::Int),
                      empty_like_shape(crow, {grid.nnz}),
                      {}};
  int32_t *crow_t = t.crow.mutable_data_ptr<int32_t>(), *order_t = t.order.mutable_data_ptr<int32_t>();
  const Tensor order = empty_like_shape(crow, {grid.nnz});
  int32_t* from = order.mutable_data_ptr<int32_t>();
  // The transposition carries 32-bit values along without looking at them: here, where each block was.
#ifdef SLKERNELS_WITH_CUDA
  if (crow.is_cuda()) {
    const int32_t device = crow.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream("block8_spmm_t", device);
    const Tensor scratch = empty_like_shape(crow, {cuda::transpose_scratch(grid)});
    check_cuda("block8_spmm_t", cuda::launch_block8_order(from, grid.nnz, stream));
    check_cuda("block8_spmm_t", cuda::launch_transpose_csr(DType::f32, grid, from, crow_t, t.row.mutable_data_ptr(),
                                                           order_t, scratch.mutable_data_ptr<int32_t>(), stream));
  } else
#endif
  {
    std::iota(from, from + grid.nnz, 0);
    cpu::transpose_csr(grid, reinterpret_cast<const float*>(from), crow_t, t.row.mutable_data_ptr(),
                       reinterpret_cast<float*>(order_t));
  }
  t.blocks = {{crow_t, t.row.const_data_ptr(), narrow, grid.m, grid.n, grid.nnz}, order_t};
  return t;
}

#ifdef SLKERNELS_WITH_CUDA
void check_tensor_core_type(const char* op, const Tensor& x) {
  check(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, op,
        "CUDA tensors must be bfloat16 or float16, got ", show(x.scalar_type()));
}

void multiply_cuda(const char* op, const Blocks& s, const Tensor& values, const Tensor& x, const Tensor& y) {
  check_tensor_core_type(op, x);
  const int32_t device = x.get_device_index();
  check(compute_capability(op, device) >= 80, op, "needs a GPU of compute capability 8.0 or newer");
  int shared_bytes = 0, multiprocessors = 0;
  check_cuda(op, cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check_cuda(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const cuda::Block8Plan plan = cuda::plan_block8(x.size(0), s.grid, shared_bytes, multiprocessors);
  // A lane reads two neighbouring values at once: not from a view that starts at an odd element.
  const int64_t flat[2] = {s.grid.nnz, kBlock};
  const Tensor v = with_aligned_rows(torch::stable::view(as_contiguous(values), {flat, 2}));
  const Tensor partial = empty_like_shape(x, {plan.partial(x.size(0), s.grid.n)}, ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(op, cuda::launch_block8_spmm(dtype_of(op, "x", x), plan, s, v.const_data_ptr(), as_matrix(x), as_matrix(y),
                                          partial.mutable_data_ptr<float>(), current_stream(op, device)));
}

// x [T, m] as [m, padded_tokens(T)].
Tensor to_features(const char* op, const Tensor& x, cudaStream_t stream) {
  const Tensor out = empty_like_shape(x, {x.size(1), cuda::padded_tokens(x.size(0))});
  check_cuda(op, cuda::launch_to_features(dtype_of(op, "x", x), as_matrix(x), out.mutable_data_ptr(), stream));
  return out;
}
#endif

// y = x S^T for S as `s` reads it, of which x's and y's columns cut the edges.
void multiply(const char* op, const Blocks& s, const Tensor& values, const Tensor& x, const Tensor& y) {
#ifdef SLKERNELS_WITH_CUDA
  if (x.is_cuda()) return multiply_cuda(op, s, values, x, y);
#endif
  const DType dtype = dtype_of(op, "x", x);
  const Matrix xm = as_matrix(x), ym = as_matrix(y);
  const auto& kernels = cpu::block8_kernels();
  const Tensor v = values_f32(values);
  if (dtype == DType::f64) {
    parallel_for(xm.rows, 1,
                 [&](int64_t b, int64_t e) { kernels.spmm_f64(s, v.const_data_ptr<double>(), xm, ym, {b, e}); });
    return;
  }
  if (xm.rows == 0 || ym.cols == 0) return;
  const int64_t features = s.grid.m * kSide, threads = torch::stable::get_num_threads();
  const int panel = panel_width(xm.rows, features);
  constexpr int64_t kPart = 16;  // block rows at least
  const int64_t parts = std::min(ceil_div(s.grid.n, kPart), ceil_div(4 * threads, ceil_div(xm.rows, panel)));
  const int64_t rows = round_up(ceil_div(s.grid.n, parts), 2);
  for_panels(dtype, x, panel, features, parts, [&](const float* xt, int64_t t0, int64_t part) {
    const Range range = {std::min(part * rows, s.grid.n), std::min((part + 1) * rows, s.grid.n)};
    kernels.spmm_panel(dtype, s, v.const_data_ptr<float>(), xt, panel, range, ym, t0);
  });
}

Tensor with_columns(const Tensor& y, const Tensor& like, int64_t columns) {
  Shape shape = shape_of(like);
  shape.back() = columns;
  return torch::stable::view(y, {shape.data(), shape.size()});
}

Tensor block8_spmm(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col, int64_t n,
                   bool validate) {
  constexpr const char* op = "block8_spmm";
  dtype_of(op, "x", x);
  check(x.dim() >= 1, op, "x must be [tokens, m], got []");
  const int64_t m = x.size(x.dim() - 1);
  const Csr grid = grid_of(op, crow, col, n, m, validate);
  check_values(op, values, grid, x, "x");
  check_same_device(op, "crow", crow, "x", x);
  const Tensor x2 = as_tokens(op, "x", x, m), y = empty_like_shape(x, {x2.size(0), n});
  multiply(op, {grid, nullptr}, values, x2, y);
  return with_columns(y, x, n);
}

Tensor block8_spmm_t(const Tensor& dy, const Tensor& values, const Tensor& crow, const Tensor& col, int64_t m,
                     bool validate) {
  constexpr const char* op = "block8_spmm_t";
  dtype_of(op, "dy", dy);
  check(dy.dim() >= 1, op, "dy must be [tokens, n], got []");
  const int64_t n = dy.size(dy.dim() - 1);
  const Csr grid = grid_of(op, crow, col, n, m, validate);
  check_values(op, values, grid, dy, "dy");
  check_same_device(op, "crow", crow, "dy", dy);
  const Tensor dy2 = as_tokens(op, "dy", dy, n), dx = empty_like_shape(dy, {dy2.size(0), m});
  const TransposedList t = transposed_list(grid, crow);
  multiply(op, t.blocks, values, dy2, dx);
  return with_columns(dx, dy, m);
}

Tensor block8_sddmm(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col, bool validate) {
  constexpr const char* op = "block8_sddmm";
  const DType dtype = dtype_of(op, "x", x);
  check(x.dim() >= 1 && dy.dim() >= 1, op, "dy must be [tokens, n] and x [tokens, m], got ", show(dy), " and ",
        show(x));
  check_same_dtype(op, "dy", dy, "x", x);
  check_same_device(op, "dy", dy, "x", x);
  const int64_t n = dy.size(dy.dim() - 1), m = x.size(x.dim() - 1);
  const Csr grid = grid_of(op, crow, col, n, m, validate);
  check_same_device(op, "crow", crow, "x", x);
  const Tensor x2 = as_tokens(op, "x", x, m), dy2 = as_tokens(op, "dy", dy, n);
  check(x2.size(0) == dy2.size(0), op, "dy and x must have the same tokens, got ", show(dy), " and ", show(x));
  const Tensor out = empty_like_shape(x, {grid.nnz, kSide, kSide});
  if (grid.nnz == 0) return out;
#ifdef SLKERNELS_WITH_CUDA
  if (x.is_cuda()) {
    check_tensor_core_type(op, x);
    const int32_t device = x.get_device_index();
    check(compute_capability(op, device) >= 80, op, "needs a GPU of compute capability 8.0 or newer");
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(op, device);
    const Tensor dyt = to_features(op, dy2, stream), xt = to_features(op, x2, stream);
    check_cuda(op, cuda::launch_block8_sddmm(dtype, grid, n, m, dyt.const_data_ptr(), xt.const_data_ptr(), x2.size(0),
                                             out.mutable_data_ptr(), stream));
    return out;
  }
#endif
  const int64_t parts = std::min<int64_t>(grid.n, torch::stable::get_num_threads());
  const auto rows_of = [&](int64_t part) { return Range{grid.n * part / parts, grid.n * (part + 1) / parts}; };
  const auto& kernels = cpu::block8_kernels();
  if (dtype == DType::f64) {
    parallel_for(parts, 1, [&](int64_t b, int64_t e) {
      for (int64_t part = b; part < e; ++part)
        kernels.sddmm_f64(grid, as_matrix(dy2), as_matrix(x2), rows_of(part), out.mutable_data_ptr<double>());
    });
    return out;
  }
  sum_over_panels(dtype, dy2, x2, grid.n * kSide, grid.m * kSide, out, parts,
                  [&](const float* dyt, const float* xt, int panel, int64_t part, float* acc) {
                    kernels.sddmm_panel(grid, dyt, xt, panel, rows_of(part), acc);
                  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("block8_spmm", TORCH_BOX(&block8_spmm));
  m.impl("block8_spmm_t", TORCH_BOX(&block8_spmm_t));
  m.impl("block8_sddmm", TORCH_BOX(&block8_sddmm));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("block8_spmm", TORCH_BOX(&block8_spmm));
  m.impl("block8_spmm_t", TORCH_BOX(&block8_spmm_t));
  m.impl("block8_sddmm", TORCH_BOX(&block8_sddmm));
}
#endif

}  // namespace slk
