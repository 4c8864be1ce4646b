// Family `sparse` at the torch boundary: checks, allocation, threads.
#include <algorithm>
#include <memory>

#include "torch/panels.h"
#include "torch/support.h"

namespace slk {
namespace {

// Splits the rows of S into `parts` runs of about equal work (a row costs its nonzeros and its store).
std::vector<int64_t> split_rows(const Csr& s, int64_t parts) {
  std::vector<int64_t> bounds(parts + 1, s.n);
  bounds[0] = 0;
  const double total = double(s.nnz) + 4.0 * s.n;
  for (int64_t p = 1; p < parts; ++p) {
    int64_t low = bounds[p - 1], high = s.n;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (double(s.crow[mid]) + 4.0 * mid < total * p / parts)
        low = mid + 1;
      else
        high = mid;
    }
    bounds[p] = std::min(s.n, round_up(low, 16));  // whole store tiles
  }
  return bounds;
}

}  // namespace

float* thread_scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> buffer;
  thread_local int64_t size = 0;
  if (floats + 16 > size) {
    buffer.reset();
    size = floats + 16;
    buffer.reset(new float[size]);
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.get()) + 63) & ~uintptr_t(63));
}

// The indices where the CPU can check them: a copy, for which the host waits, when they are on a GPU.
static Tensor on_cpu(const Tensor& t) {
  if (!t.is_cuda()) return t;
  const Shape shape = shape_of(t);
  const Tensor host = torch::stable::empty({shape.data(), shape.size()}, t.scalar_type(), std::nullopt,
                                           torch::stable::Device(torch::headeronly::DeviceType::CPU));
  torch::stable::copy_(const_cast<Tensor&>(host), t);
  return host;
}

Csr as_csr(const char* op, const Tensor& crow, const Tensor& col, int64_t n, int64_t m, bool validate) {
  check(n >= 0 && m >= 0, op, "n and m must not be negative, got ", n, " and ", m);
  check(crow.dim() == 1 && crow.size(0) == n + 1, op, "crow must be [", n + 1, "], got ", show(crow));
  check(crow.scalar_type() == ScalarType::Int, op, "crow must be int32, got ", show(crow.scalar_type()));
  check(col.dim() == 1, op, "col must be [nnz], got ", show(col));
  const ScalarType index = m <= 32768 ? ScalarType::Short : ScalarType::Int;
  check(col.scalar_type() == ScalarType::Int || col.scalar_type() == index, op, "col must be ", show(index), " for ", m,
        " columns, got ", show(col.scalar_type()));
  check(crow.is_contiguous() && col.is_contiguous(), op, "crow and col must be contiguous");
  check_same_device(op, "crow", crow, "col", col);
  const Csr s = {
      crow.const_data_ptr<int32_t>(), col.const_data_ptr(), col.scalar_type() == ScalarType::Short, n, m, col.size(0)};
  if (validate) {
    const Tensor host_crow = on_cpu(crow), host_col = on_cpu(col);
    const SupportFault f = cpu::check_support(
        {host_crow.const_data_ptr<int32_t>(), host_col.const_data_ptr(), s.col_is_16, s.n, s.m, s.nnz});
    switch (f.kind) {
      case SupportFault::none:
        break;
      case SupportFault::crow_start:
        check(false, op, "crow[0] must be 0, got ", f.got);
        break;
      case SupportFault::crow_end:
        check(false, op, "crow[", n, "] must be nnz = ", s.nnz, ", got ", f.got);
        break;
      case SupportFault::crow_decreasing:
        check(false, op, "crow decreases at position ", f.position, " (", f.got, ")");
        break;
      case SupportFault::col_range:
        check(false, op, "col[", f.position, "] = ", f.got, " in row ", f.row, " is out of range [0, ", m, ")");
        break;
      case SupportFault::col_unsorted:
        check(false, op, "col[", f.position, "] = ", f.got, " in row ", f.row,
              " is smaller than the one before it (unsorted)");
        break;
      case SupportFault::col_duplicate:
        check(false, op, "col[", f.position, "] = ", f.got, " in row ", f.row, " is a duplicate");
        break;
    }
  }
  return s;
}

Tensor values_f32(const Tensor& values) {
  const Tensor v = as_contiguous(values);
  if (v.scalar_type() == ScalarType::Float || v.scalar_type() == ScalarType::Double) return v;
  const DType dtype = dtype_of("values", "values", v);
  Tensor out = empty_like_shape(v, shape_of(v), ScalarType::Float);
  parallel_for(v.numel(), 1 << 15, [&](int64_t b, int64_t e) {
    cpu::sparse_kernels().to_f32(dtype, v.const_data_ptr(), out.mutable_data_ptr<float>(), {b, e});
  });
  return out;
}

namespace {

// Values as fp32, or fp64 as x.
void spmm_cpu_into(const Csr& s, const Tensor& values, const Tensor& x, const Tensor& y, bool accumulate) {
  const auto& kernels = cpu::sparse_kernels();
  const DType dtype = dtype_of("spmm", "x", x);
  const Matrix xm = as_matrix(x), ym = as_matrix(y);
  const int64_t tokens = xm.rows, threads = torch::stable::get_num_threads();
  if (tokens == 0 || s.n == 0) return;
  if (dtype == DType::f64) {
    parallel_for(tokens, 1, [&](int64_t b, int64_t e) {
      kernels.spmm_f64(s, values.const_data_ptr<double>(), xm, ym, {b, e}, accumulate);
    });
    return;
  }
  const float* v = values.const_data_ptr<float>();

  const int panel = panel_width(tokens, s.m);
  const int64_t parts = s.nnz < 4096 ? 1 : ceil_div(4 * threads, ceil_div(tokens, panel));
  const std::vector<int64_t> bounds = split_rows(s, parts);
  if (tokens == 1) {
    const Tensor x32 = empty_like_shape(x, {s.m}, ScalarType::Float);
    kernels.to_f32(dtype, xm.data, x32.mutable_data_ptr<float>(), {0, s.m});
    parallel_for(parts, 1, [&](int64_t b, int64_t e) {
      kernels.spmv(dtype, s, v, x32.const_data_ptr<float>(), {bounds[b], bounds[e]}, ym.data, accumulate);
    });
    return;
  }
  for_panels(dtype, x, panel, s.m, parts, [&](const float* xt, int64_t t0, int64_t part) {
    kernels.spmm_panel(dtype, s, v, xt, panel, {bounds[part], bounds[part + 1]}, ym, t0, accumulate);
  });
}

TransposedCsr transposed_cpu(const Csr& s, const Tensor& crow, const Tensor& values) {
  TransposedCsr t = {empty_like_shape(crow, {s.m + 1}),
                     empty_like_shape(crow, {s.nnz}, s.n <= 32768 ? ScalarType::Short : ScalarType::Int),
                     empty_like_shape(values, {s.nnz}),
                     {}};
  int32_t* crow_t = t.crow.mutable_data_ptr<int32_t>();
  if (values.scalar_type() == ScalarType::Double)
    cpu::transpose_csr(s, values.const_data_ptr<double>(), crow_t, t.row.mutable_data_ptr(),
                       t.values.mutable_data_ptr<double>());
  else
    cpu::transpose_csr(s, values.const_data_ptr<float>(), crow_t, t.row.mutable_data_ptr(),
                       t.values.mutable_data_ptr<float>());
  t.csr = {crow_t, t.row.const_data_ptr(), s.n <= 32768, s.m, s.n, s.nnz};
  return t;
}

Tensor sddmm_cpu(const Csr& s, const Tensor& dy, const Tensor& x) {
  const auto& kernels = cpu::sparse_kernels();
  const DType dtype = dtype_of("sddmm", "x", x);
  const Matrix xm = as_matrix(x), dym = as_matrix(dy);
  const int64_t threads = torch::stable::get_num_threads();
  Tensor out = empty_like_shape(x, {s.nnz});
  if (s.nnz == 0) return out;
  const std::vector<int64_t> bounds = split_rows(s, threads);
  const int64_t parts = threads;
  if (dtype == DType::f64) {
    parallel_for(parts, 1, [&](int64_t b, int64_t e) {
      kernels.sddmm_f64(s, dym, xm, {bounds[b], bounds[e]}, out.mutable_data_ptr<double>());
    });
    return out;
  }
  sum_over_panels(dtype, dy, x, s.n, s.m, out, parts,
                  [&](const float* dyt, const float* xt, int panel, int64_t part, float* dv) {
                    kernels.sddmm_panel(s, dyt, xt, panel, {bounds[part], bounds[part + 1]}, dv);
                  });
  return out;
}

Tensor gather_cpu(const Csr& s, const Tensor& w) {
  const DType dtype = dtype_of("gather_support", "w", w);
  Tensor out = empty_like_shape(w, {s.nnz});
  const Matrix matrix = as_matrix(w);
  parallel_for(s.n, 64, [&](int64_t b, int64_t e) {
    cpu::sparse_kernels().gather(dtype, s, matrix.data, matrix.ld, {b, e}, out.mutable_data_ptr());
  });
  return out;
}

void scatter_add_cpu(const Csr& s, const Tensor& values, const Tensor& w) {
  const DType dtype = dtype_of("compose", "values", values);
  const Tensor v = as_contiguous(values);
  parallel_for(s.n, 64, [&](int64_t b, int64_t e) {
    cpu::sparse_kernels().scatter_add(dtype, s, v.const_data_ptr(), w.mutable_data_ptr(), s.m, {b, e});
  });
}

}  // namespace

// ---- where the tensors are ------------------------------------------------------------------------------------------

void spmm_into(const Csr& s, const Tensor& values, const Tensor& x, const Tensor& y, bool accumulate) {
#ifdef SLKERNELS_WITH_CUDA
  if (x.is_cuda()) return cuda::spmm_into(s, values, x, y, accumulate);
#endif
  spmm_cpu_into(s, values_f32(values), x, y, accumulate);
}

TransposedCsr transposed(const Csr& s, const Tensor& crow, const Tensor& values) {
#ifdef SLKERNELS_WITH_CUDA
  if (values.is_cuda()) return cuda::transposed(s, crow, values);
#endif
  return transposed_cpu(s, crow, values_f32(values));
}

Tensor sddmm_at(const Csr& s, const Tensor& dy, const Tensor& x) {
#ifdef SLKERNELS_WITH_CUDA
  if (x.is_cuda()) return cuda::sddmm_at(s, dy, x);
#endif
  return sddmm_cpu(s, dy, x);
}

Tensor gather_at(const Csr& s, const Tensor& w) {
#ifdef SLKERNELS_WITH_CUDA
  if (w.is_cuda()) return cuda::gather_at(s, w);
#endif
  return gather_cpu(s, w);
}

Tensor compose_weight(const Csr& s, const Tensor& values, const Tensor* A, const Tensor* B, double alpha,
                      const Tensor* base) {
  Tensor w = empty_like_shape(values, {s.n, s.m});
  if (A)
    addmm_out(w, base ? *base : w, *B, *A, base ? 1 : 0, alpha);
  else if (base)
    torch::stable::copy_(w, *base);
  else
    torch::stable::zero_(w);
#ifdef SLKERNELS_WITH_CUDA
  if (w.is_cuda()) {
    cuda::scatter_add(s, values, w);
    return w;
  }
#endif
  scatter_add_cpu(s, values, w);
  return w;
}

void check_lowrank(const char* op, const Tensor& A, const Tensor& B, int64_t n, int64_t m, const char* like_name,
                   const Tensor& like) {
  check(A.dim() == 2 && A.size(1) == m, op, "A must be [rank, ", m, "], got ", show(A));
  check(B.dim() == 2 && B.size(0) == n, op, "B must be [", n, ", rank], got ", show(B));
  check(A.size(0) == B.size(1), op, "A and B must have the same rank, got A ", show(A), " and B ", show(B));
  check_same_dtype(op, "A", A, like_name, like);
  check_same_dtype(op, "B", B, like_name, like);
  check_same_device(op, "A", A, like_name, like);
  check_same_device(op, "B", B, like_name, like);
}

namespace {

void check_values(const char* op, const Tensor& values, const Csr& s, const Tensor& x, const char* x_name) {
  check(values.dim() == 1 && values.size(0) == s.nnz, op, "values must be [", s.nnz, "], got ", show(values));
  check_same_dtype(op, "values", values, x_name, x);
  check_same_device(op, "values", values, x_name, x);
}

Tensor spmm_with(const char* op, const Tensor& x, const char* x_name, const Tensor& values, const Tensor& crow,
                 const Tensor& col, int64_t n, int64_t m, bool transpose, bool validate) {
  check_same_device(op, "crow", crow, x_name, x);
  const Csr s = as_csr(op, crow, col, n, m, validate);
  dtype_of(op, x_name, x);
  check_values(op, values, s, x, x_name);
  const Tensor tokens = as_tokens(op, x_name, x, transpose ? n : m);
  Shape shape = shape_of(x);
  shape.back() = transpose ? m : n;
  Tensor y = empty_like_shape(x, shape);
  const Tensor y2 = as_tokens(op, "y", y, shape.back());
  if (transpose) {
    const TransposedCsr t = transposed(s, crow, values);
    spmm_into(t.csr, t.values, tokens, y2, false);
  } else {
    spmm_into(s, values, tokens, y2, false);
  }
  return y;
}

Tensor spmm(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& col, int64_t n, bool validate) {
  check(x.dim() >= 1, "spmm", "x must be [tokens, m], got ", show(x));
  return spmm_with("spmm", x, "x", values, crow, col, n, x.size(x.dim() - 1), false, validate);
}

Tensor spmm_t(const Tensor& dy, const Tensor& values, const Tensor& crow, const Tensor& col, int64_t m, bool validate) {
  check(dy.dim() >= 1, "spmm_t", "dy must be [tokens, n], got ", show(dy));
  return spmm_with("spmm_t", dy, "dy", values, crow, col, dy.size(dy.dim() - 1), m, true, validate);
}

Tensor sddmm(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col, bool validate) {
  check(dy.dim() >= 1, "sddmm", "dy must be [tokens, n], got ", show(dy));
  check(x.dim() >= 1, "sddmm", "x must be [tokens, m], got ", show(x));
  const int64_t n = dy.size(dy.dim() - 1), m = x.size(x.dim() - 1);
  check_same_device("sddmm", "dy", dy, "x", x);
  check_same_device("sddmm", "crow", crow, "x", x);
  const Csr s = as_csr("sddmm", crow, col, n, m, validate);
  dtype_of("sddmm", "x", x);
  check_same_dtype("sddmm", "dy", dy, "x", x);
  const Tensor x2 = as_tokens("sddmm", "x", x, m), dy2 = as_tokens("sddmm", "dy", dy, n);
  check(x2.size(0) == dy2.size(0), "sddmm", "dy and x must have the same tokens, got ", show(dy), " and ", show(x));
  return sddmm_at(s, dy2, x2);
}

void check_support(const Tensor& crow, const Tensor& col, int64_t n, int64_t m) {
  as_csr("check_support", crow, col, n, m, true);
}

Tensor gather_support(const Tensor& w, const Tensor& crow, const Tensor& col, bool validate) {
  check(w.dim() == 2, "gather_support", "w must be [n, m], got ", show(w));
  check_same_device("gather_support", "crow", crow, "w", w);
  const Csr s = as_csr("gather_support", crow, col, w.size(0), w.size(1), validate);
  dtype_of("gather_support", "w", w);
  return gather_at(s, as_tokens("gather_support", "w", w, w.size(1)));
}

Tensor compose(const Tensor& values, const Tensor& crow, const Tensor& col, int64_t m, std::optional<Tensor> A,
               std::optional<Tensor> B, double alpha, std::optional<Tensor> base, bool validate) {
  const char* op = "compose";
  check(crow.dim() == 1 && crow.size(0) >= 1, op, "crow must be [n + 1], got ", show(crow));
  const int64_t n = crow.size(0) - 1;
  const Csr s = as_csr(op, crow, col, n, m, validate);
  dtype_of(op, "values", values);
  check(values.dim() == 1 && values.size(0) == s.nnz, op, "values must be [", s.nnz, "], got ", show(values));
  check_same_device(op, "crow", crow, "values", values);
  check(A.has_value() == B.has_value(), op, "A and B go together");
  if (A) check_lowrank(op, *A, *B, n, m, "values", values);
  if (base) {
    check(base->dim() == 2 && base->size(0) == n && base->size(1) == m, op, "base must be [", n, ", ", m, "], got ",
          show(*base));
    check_same_dtype(op, "base", *base, "values", values);
    check_same_device(op, "base", *base, "values", values);
  }
  return compose_weight(s, values, A ? &*A : nullptr, B ? &*B : nullptr, alpha, base ? &*base : nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("spmm_t", TORCH_BOX(&spmm_t));
  m.impl("sddmm", TORCH_BOX(&sddmm));
  m.impl("check_support", TORCH_BOX(&check_support));
  m.impl("gather_support", TORCH_BOX(&gather_support));
  m.impl("compose", TORCH_BOX(&compose));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("spmm", TORCH_BOX(&spmm));
  m.impl("spmm_t", TORCH_BOX(&spmm_t));
  m.impl("sddmm", TORCH_BOX(&sddmm));
  m.impl("check_support", TORCH_BOX(&check_support));
  m.impl("gather_support", TORCH_BOX(&gather_support));
  m.impl("compose", TORCH_BOX(&compose));
}
#endif

}  // namespace slk
