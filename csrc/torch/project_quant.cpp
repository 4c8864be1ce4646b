// Quantized weights of family `project` at the torch boundary.
#include "slkernels/project_quant.h"

#include <algorithm>

#include "torch/project.h"
#include "torch/support.h"

namespace slk {
namespace {

void check_group(const char* op, int64_t bits, int64_t group) {
  check(bits == 4 || bits == 8, op, "bits must be 4 or 8, got ", bits);
  check(group >= kGroupMultiple && group <= kMaxGroup && group % kGroupMultiple == 0, op,
        "group must be a multiple of ", kGroupMultiple, " from ", kGroupMultiple, " to ", kMaxGroup, ", got ", group);
}

int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

GroupCodes group_codes(const Tensor& codes, const Tensor& scale, const Tensor& zero, int64_t columns, int64_t bits,
                       int64_t group) {
  return {codes.mutable_data_ptr<uint8_t>(),
          scale.mutable_data_ptr<float>(),
          zero.mutable_data_ptr<uint8_t>(),
          columns,
          group,
          int(bits)};
}

// Checks (codes, scale, zero) of a weight with `columns` columns.
void check_quantized(const char* op, const Tensor& codes, const Tensor& scale, const Tensor& zero, int64_t columns,
                     int64_t bits, int64_t group) {
  check_group(op, bits, group);
  check(codes.dim() >= 1, op, "codes must have at least one dimension");
  check(codes.scalar_type() == ScalarType::Byte, op, "codes must be uint8, got ", show(codes.scalar_type()));
  check(scale.scalar_type() == ScalarType::Float, op, "scale must be float32, got ", show(scale.scalar_type()));
  check(zero.scalar_type() == ScalarType::Byte, op, "zero must be uint8, got ", show(zero.scalar_type()));
  Shape shape = shape_of(codes);
  shape.back() = bits == 8 ? columns : ceil_div(columns, 2);
  check_shape(op, "codes", codes, shape);
  shape.back() = ceil_div(columns, group);
  check_shape(op, "scale", scale, shape);
  check_shape(op, "zero", zero, shape);
  check_same_device(op, "scale", scale, "codes", codes);
  check_same_device(op, "zero", zero, "codes", codes);
}

// out [rows, columns], contiguous, = W there; float32, bfloat16 or float16.
void dequantize_into(const char* op, const GroupCodes& q, Range rows, Range columns, const Tensor& out) {
  if (rows.size() == 0 || columns.size() == 0) return;
  const DType type = float_type(op, "dtype", out);
  char* to = static_cast<char*>(out.mutable_data_ptr());
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(out)) {
    check_cuda(op, cuda::launch_dequantize_group(q, rows, columns, type, to, columns.size(),
                                                 current_stream(op, out.get_device_index())));
    return;
  }
#endif
  const int64_t row_bytes = columns.size() * (type == DType::f32 ? 4 : 2);
  parallel_for(rows.size(), grain_rows(columns.size()), [&](int64_t b, int64_t e) {
    cpu::quant_kernels().dequantize(q, {rows.begin + b, rows.begin + e}, columns, type, to + b * row_bytes,
                                    columns.size());
  });
}

// ---- quantize_group, dequantize_group -------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> quantize_group(const Tensor& w, int64_t bits, int64_t group, int64_t round_mode,
                                                  MaybeTensor rng) {
  constexpr const char* op = "quantize_group";
  check(w.dim() >= 1, op, "w must have at least one dimension");
  check_group(op, bits, group);
  check_rounding(op, w, round_mode, rng);
  const DType type = float_type(op, "w", w);
  const Tensor in = as_contiguous(w);
  const int64_t m = in.size(in.dim() - 1), rows = rows_of(in);
  Shape shape = shape_of(in);
  shape.back() = bits == 8 ? m : ceil_div(m, 2);
  const Tensor codes = empty_like_shape(in, shape, ScalarType::Byte);
  shape.back() = ceil_div(m, group);
  const Tensor scale = empty_like_shape(in, shape, ScalarType::Float);
  const Tensor zero = empty_like_shape(in, shape, ScalarType::Byte);
  const GroupCodes q = group_codes(codes, scale, zero, m, bits, group);
  const void* from = in.const_data_ptr();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(w)) {
    const DeviceScope scope(w);
    check_cuda(op, cuda::launch_quantize_group(type, from, q, rows, device_rounding(round_mode, rng),
                                               current_stream(op, w.get_device_index())));
    return {codes, scale, zero};
  }
#endif
  const StochasticRounding rounding = host_rounding(round_mode, rng);
  if (m > 0)
    parallel_for(rows, grain_rows(m),
                 [&](int64_t b, int64_t e) { cpu::quant_kernels().quantize(type, from, q, rounding, {b, e}); });
  return {codes, scale, zero};
}

Tensor dequantize_group(const Tensor& codes, const Tensor& scale, const Tensor& zero, std::optional<int64_t> columns,
                        int64_t bits, int64_t group, std::optional<ScalarType> dtype) {
  constexpr const char* op = "dequantize_group";
  check(codes.dim() >= 1, op, "codes must have at least one dimension");
  check_group(op, bits, group);
  const int64_t m = columns.value_or(codes.size(codes.dim() - 1) * (8 / bits));
  check_quantized(op, codes, scale, zero, m, bits, group);
  const Tensor c = as_contiguous(codes), s = as_contiguous(scale), z = as_contiguous(zero);
  Shape shape = shape_of(codes);
  shape.back() = m;
  const Tensor out = empty_like_shape(codes, shape, dtype.value_or(ScalarType::Float));
  float_type(op, "dtype", out);
  const DeviceScope scope(codes);
  dequantize_into(op, group_codes(c, s, z, m, bits, group), {0, rows_of(out)}, {0, m}, out);
  return out;
}

// ---- project_back_add_q_ --------------------------------------------------------------------------------------------

constexpr const char* kBackAdd = "project_back_add_q_";

BackProjection back_add_product(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& N,
                                const MaybeTensor& left, const MaybeTensor& right, int64_t group,
                                const UpdateOptions& options) {
  check(codes.dim() == 2, kBackAdd, "codes must be [n, m], got ", show(codes));
  check_quantized(kBackAdd, codes, scale, zero, codes.size(1), 8, group);
  check(codes.is_contiguous() && scale.is_contiguous() && zero.is_contiguous(), kBackAdd,
        "codes, scale and zero must be contiguous");
  float_type(kBackAdd, "N", N);
  check_same_device(kBackAdd, "N", N, "codes", codes);
  check_update(kBackAdd, codes, options);
  return BackProjection(kBackAdd, N, left, right, codes.size(0), codes.size(1));
}

void project_back_add_q_(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& N,
                         const Tensor& lr, MaybeTensor left, MaybeTensor right, int64_t group, double alpha,
                         double weight_decay, MaybeTensor found_inf, int64_t round_mode, MaybeTensor rng) {
  const UpdateOptions options = {lr, alpha, weight_decay, found_inf, round_mode, rng};
  BackProjection product = back_add_product(codes, scale, zero, N, left, right, group, options);
  if (codes.numel() == 0 || is_skipped(options)) return;
  const GroupCodes q = group_codes(codes, scale, zero, codes.size(1), 8, group);
  const UpdateScalars scalars = host_scalars(options);
  const StochasticRounding rounding = host_rounding(round_mode, rng);
  for_slices(product, codes.size(0), [&](const UpdateOperands& operands, int64_t first, int64_t rows) {
    parallel_for(rows, grain_rows(q.m), [&](int64_t b, int64_t e) {
      cpu::quant_kernels().update(q, operands, scalars, rounding, {first + b, first + e});
    });
  });
}

#ifdef SLKERNELS_WITH_CUDA
void project_back_add_q_cuda(const Tensor& codes, const Tensor& scale, const Tensor& zero, const Tensor& N,
                             const Tensor& lr, MaybeTensor left, MaybeTensor right, int64_t group, double alpha,
                             double weight_decay, MaybeTensor found_inf, int64_t round_mode, MaybeTensor rng) {
  const UpdateOptions options = {lr, alpha, weight_decay, found_inf, round_mode, rng};
  BackProjection product = back_add_product(codes, scale, zero, N, left, right, group, options);
  if (codes.numel() == 0) return;
  const DeviceScope scope(codes);
  const cudaStream_t stream = current_stream(kBackAdd, codes.get_device_index());
  const GroupCodes q = group_codes(codes, scale, zero, codes.size(1), 8, group);
  const cuda::DeviceUpdate update = device_update(options);
  for_slices(product, codes.size(0), [&](const UpdateOperands& operands, int64_t first, int64_t rows) {
    check_cuda(kBackAdd, cuda::launch_update_q(q, {first, first + rows}, operands, update, stream));
  });
}
#endif

// ---- w8a16_linear ---------------------------------------------------------------------------------------------------

constexpr const char* kLinear = "w8a16_linear";

// Elements of W that are dequantized at a time, for the dense product that reads them next: within a CPU's L3 or a
// GPU's L2, and, on a GPU, enough for a product to fill it.
int64_t slice_elements(const Tensor& x) {
  return int64_t(1) << (is_cuda(x) ? 23 : 20);
}

// Rows and columns of W in `type` (or fp64, by way of fp32).
Tensor dequantized(const GroupCodes& q, const Tensor& like, Range rows, Range columns) {
  const ScalarType type = like.scalar_type();
  const bool wide = type == ScalarType::Double;
  Tensor out = empty_like_shape(like, {rows.size(), columns.size()}, wide ? ScalarType::Float : type);
  dequantize_into(kLinear, q, rows, columns, out);
  if (!wide) return out;
  Tensor doubles = empty_like_shape(like, shape_of(out));
  return torch::stable::copy_(doubles, out);
}

// One pass over the codes; y [tokens, n].
void few_tokens(const GroupCodes& q, const Tensor& x, const MaybeTensor& bias, const Tensor& y) {
  const int64_t tokens = x.size(0), n = y.size(1), m = q.m;
  const DType type = dtype_of(kLinear, "x", x);
  const Tensor rows = as_contiguous(x), offset = bias ? as_contiguous(*bias) : Tensor();
#ifdef SLKERNELS_WITH_CUDA
  if (is_cuda(x)) {
    check_cuda(kLinear, cuda::launch_linear_q(type, q, rows.const_data_ptr(), tokens, n,
                                              bias ? offset.const_data_ptr() : nullptr, y.mutable_data_ptr(),
                                              current_stream(kLinear, x.get_device_index())));
    return;
  }
#endif
  const Tensor x32 = values_f32(rows), b32 = bias ? values_f32(offset) : Tensor();
  const Tensor y32 = type == DType::f32 ? y : empty_like_shape(x, {tokens, n}, ScalarType::Float);
  float* out = y32.mutable_data_ptr<float>();
  parallel_for(n, std::max<int64_t>(16, (1 << 18) / (std::max<int64_t>(m, 1) * std::max<int64_t>(tokens, 1))),
               [&](int64_t b, int64_t e) {
                 cpu::quant_kernels().linear(q, x32.const_data_ptr<float>(), tokens, n, {b, e},
                                             bias ? b32.const_data_ptr<float>() : nullptr, out);
               });
  if (type != DType::f32) {
    Tensor rounded = y;
    torch::stable::copy_(rounded, y32);
  }
}

Tensor w8a16_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Tensor& zero, int64_t group,
                    MaybeTensor bias, MaybeTensor carrier) {
  const char* op = kLinear;
  check(codes.dim() == 2, op, "codes must be [n, m], got ", show(codes));
  const int64_t n = codes.size(0), m = codes.size(1);
  check_quantized(op, codes, scale, zero, m, 8, group);
  const DType type = dtype_of(op, "x", x);
  check_same_device(op, "codes", codes, "x", x);
  const Tensor x2 = as_tokens(op, "x", x, m);
  if (bias) {
    check_shape(op, "bias", *bias, {n});
    check_same_dtype(op, "bias", *bias, "x", x);
  }
  if (carrier) {
    check_shape(op, "carrier", *carrier, {n, m});
    check_same_dtype(op, "carrier", *carrier, "x", x);
  }
  const Tensor c = as_contiguous(codes), s = as_contiguous(scale), z = as_contiguous(zero);
  const GroupCodes q = group_codes(c, s, z, m, 8, group);
  const int64_t tokens = x2.size(0);
  Shape shape = shape_of(x);
  shape.back() = n;
  const Tensor y = empty_like_shape(x, {tokens, n});
  const DeviceScope scope(x);
  if (type != DType::f64 && tokens <= (is_cuda(x) ? kFewTokens : kFewTokensCpu)) {
    few_tokens(q, x2, bias, y);
  } else {
    const int64_t slice = std::max<int64_t>(1, slice_elements(x) / std::max<int64_t>(m, 1));
    for (int64_t first = 0; first < n; first += slice) {
      const int64_t rows = std::min(slice, n - first);
      const Tensor w = dequantized(q, x, {first, first + rows}, {0, m});
      Tensor whole = y;
      const Tensor part = torch::stable::narrow(whole, 1, first, rows);
      Tensor b = part;
      if (bias) {
        Tensor all = *bias;
        b = torch::stable::narrow(all, 0, first, rows);
      }
      dense_out(part, b, x2, t2(w), bias ? 1 : 0, 1);
    }
  }
  return torch::stable::view(y, {shape.data(), shape.size()});
}

// dx = dy W by columns of W: each result is one sum, rounded once.
Tensor w8a16_linear_dx(const Tensor& dy, const Tensor& codes, const Tensor& scale, const Tensor& zero, int64_t group) {
  const char* op = "_w8a16_linear_dx";
  const int64_t n = codes.size(0), m = codes.size(1);
  check_quantized(op, codes, scale, zero, m, 8, group);
  const Tensor dy2 = as_tokens(op, "dy", dy, n);
  const Tensor c = as_contiguous(codes), s = as_contiguous(scale), z = as_contiguous(zero);
  const GroupCodes q = group_codes(c, s, z, m, 8, group);
  Shape shape = shape_of(dy);
  shape.back() = m;
  const DeviceScope scope(dy);
  const Tensor dx = empty_like_shape(dy, {dy2.size(0), m});
  const int64_t slice = round_up(std::max<int64_t>(1, slice_elements(dy) / std::max<int64_t>(n, 1)), group);
  for (int64_t first = 0; first < m; first += slice) {
    const int64_t columns = std::min(slice, m - first);
    const Tensor w = dequantized(q, dy, {0, n}, {first, first + columns});
    Tensor whole = dx;
    const Tensor part = torch::stable::narrow(whole, 1, first, columns);
    dense_out(part, part, dy2, w, 0, 1);
  }
  return torch::stable::view(dx, {shape.data(), shape.size()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("quantize_group", TORCH_BOX(&quantize_group));
  m.impl("dequantize_group", TORCH_BOX(&dequantize_group));
  m.impl("project_back_add_q_", TORCH_BOX(&project_back_add_q_));
  m.impl("w8a16_linear", TORCH_BOX(&w8a16_linear));
  m.impl("_w8a16_linear_dx", TORCH_BOX(&w8a16_linear_dx));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("quantize_group", TORCH_BOX(&quantize_group));
  m.impl("dequantize_group", TORCH_BOX(&dequantize_group));
  m.impl("project_back_add_q_", TORCH_BOX(&project_back_add_q_cuda));
  m.impl("w8a16_linear", TORCH_BOX(&w8a16_linear));
  m.impl("_w8a16_linear_dx", TORCH_BOX(&w8a16_linear_dx));
}
#endif

}  // namespace slk
