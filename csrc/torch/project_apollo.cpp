// apollo_scale_update_ at the torch boundary. Two passes over G: the sums of squares of its channels, and the update.
#include <cmath>

#include "torch/project.h"

namespace slk {
namespace {

constexpr const char* kOp = "apollo_scale_update_";

// The call after its checks, with G, N and R as the kernels read them.
struct Call {
  Side side;
  bool per_tensor;
  bool residual;
  Tensor G, N, R;
  int64_t n, m, rank, channels;
};

Call check_call(const Tensor& W, const Tensor& G, const Tensor& N, const Tensor& R, const Tensor& norm,
                const std::string& side, const std::string& kind, const MaybeTensor& left, const MaybeTensor& right,
                const UpdateOptions& options) {
  check_matrix(kOp, "W", W);
  float_type(kOp, "W", W);
  check(W.is_contiguous(), kOp, "W must be contiguous");
  Call c = {};
  c.n = W.size(0);
  c.m = W.size(1);
  c.side = side_of(kOp, side, c.n, c.m);
  check_shape(kOp, "G", G, {c.n, c.m});
  check_same_dtype(kOp, "G", G, "W", W);
  check_matrix(kOp, "R", R);
  c.rank = R.size(c.side == Side::left ? 0 : 1);
  check_shape(kOp, "R", R, c.side == Side::left ? Shape{c.rank, c.m} : Shape{c.n, c.rank});
  check_shape(kOp, "N", N, shape_of(R));
  for (const auto& [name, t] : {std::pair("N", &N), std::pair("R", &R)})
    check(t->scalar_type() == W.scalar_type() || t->scalar_type() == ScalarType::Float, kOp, name,
          " must have W's dtype ", show(W.scalar_type()), " or be float32, got ", show(t->scalar_type()));
  for (const auto& [name, t] : {std::pair("G", &G), std::pair("N", &N), std::pair("R", &R)})
    check_same_device(kOp, name, *t, "W", W);
  check(norm.numel() == 1 && norm.scalar_type() == ScalarType::Float, kOp,
        "norm must be a float32 tensor with one element, got ", show(norm.scalar_type()), " ", show(norm));
  check_same_device(kOp, "norm", norm, "W", W);
  check(kind == "channel" || kind == "tensor", kOp, "kind must be channel or tensor, got ", kind);
  check(!left || c.side == Side::left, kOp, "left must not be given where side is right");
  check(!right || c.side == Side::right, kOp, "right must not be given where side is left");
  check_update(kOp, W, options);
  c.per_tensor = kind == "tensor";
  c.residual = left || right;
  c.channels = c.side == Side::left ? c.m : c.n;
  c.G = with_unit_columns(G);
  c.N = with_unit_columns(N);
  c.R = with_unit_columns(R);
  return c;
}

// N - f R, whose back projection Fira adds; f a factor for each channel. As N's type.
Tensor less_scaled(const Call& c, const Tensor& factor) {
  Tensor f = factor;
  if (!c.per_tensor) {
    const int64_t shape[2] = {c.side == Side::left ? 1 : c.n, c.side == Side::left ? c.m : 1};
    f = torch::stable::view(f, {shape, 2});
  }
  const Tensor difference = torch::stable::subtract(c.N, aten("aten::mul", "Tensor", c.R, f));
  if (difference.scalar_type() == c.N.scalar_type()) return difference;
  Tensor out = empty_like_shape(c.N, shape_of(c.N));
  return torch::stable::copy_(out, difference);
}

UpdateOperands operands_of(const Call& c, const Tensor& factor) {
  UpdateOperands operands = no_operands();
  operands.g = c.G.const_data_ptr();
  operands.g_type = dtype_of(kOp, "G", c.G);
  operands.ldg = c.G.stride(0);
  operands.factor = factor.const_data_ptr<float>();
  operands.factor_of = c.per_tensor ? FactorOf::all : c.side == Side::left ? FactorOf::column : FactorOf::row;
  return operands;
}

// ---- on a CPU -------------------------------------------------------------------------------------------------------

// Sums of squares of x's channels, [channels]: rows of a tall gradient, columns of a wide one.
Tensor squares_cpu(const Call& c, const Tensor& x) {
  const Tensor sums = empty_like_shape(x, {c.channels}, ScalarType::Float);
  const DType type = dtype_of(kOp, "G", x);
  const void* data = x.const_data_ptr();
  const int64_t rows = x.size(0), columns = x.size(1), ld = x.stride(0);
  float* out = sums.mutable_data_ptr<float>();
  if (c.side == Side::left)
    parallel_for(columns, std::max<int64_t>(512, 65536 / std::max<int64_t>(rows, 1)), [&](int64_t begin, int64_t end) {
      cpu::project_kernels().column_squares(type, data, ld, rows, {begin, end}, out);
    });
  else
    parallel_for(rows, grain_rows(columns), [&](int64_t begin, int64_t end) {
      cpu::project_kernels().row_squares(type, data, ld, columns, {begin, end}, out);
    });
  return sums;
}

void apollo_cpu(const Tensor& W, const Tensor& G, const Tensor& N, const Tensor& R, const Tensor& norm,
                const Tensor& lr, Text side, Text kind, double alpha, double limiter, double weight_decay,
                MaybeTensor left, MaybeTensor right, MaybeTensor found_inf, int64_t round_mode, MaybeTensor rng) {
  const UpdateOptions options = {lr, alpha, weight_decay, found_inf, round_mode, rng};
  const Call c = check_call(W, G, N, R, norm, side, kind, left, right, options);
  if (W.numel() == 0 || is_skipped(options)) return;
  const Tensor squares[3] = {squares_cpu(c, c.N), squares_cpu(c, c.R), squares_cpu(c, c.G)};
  const Tensor factor = empty_like_shape(squares[0], {c.per_tensor ? 1 : c.channels});
  apollo_factors({squares[0].const_data_ptr<float>(), squares[1].const_data_ptr<float>(),
                  squares[2].const_data_ptr<float>(), c.channels, c.per_tensor, c.residual, float(limiter)},
                 norm.mutable_data_ptr<float>(), factor.mutable_data_ptr<float>());

  const UpdateScalars scalars = host_scalars(options);
  const StochasticRounding rounding = host_rounding(round_mode, rng);
  const DType type = float_type(kOp, "W", W);
  void* w = W.mutable_data_ptr();
  const auto update = [&](const UpdateOperands& operands, int64_t first, int64_t rows) {
    parallel_for(rows, grain_rows(c.m), [&](int64_t begin, int64_t end) {
      cpu::project_kernels().update(type, w, c.m, operands, scalars, rounding, {first + begin, first + end});
    });
  };
  const UpdateOperands operands = operands_of(c, factor);
  if (!c.residual) return update(operands, 0, c.n);
  BackProjection product(kOp, less_scaled(c, factor), left, right, c.n, c.m);
  for_slices(product, c.n, update, operands);
}

// ---- on a GPU -------------------------------------------------------------------------------------------------------

#ifdef SLKERNELS_WITH_CUDA

Tensor squares_cuda(const Call& c, const Tensor& x, cudaStream_t stream) {
  const Tensor sums = empty_like_shape(x, {c.channels}, ScalarType::Float);
  const DType type = dtype_of(kOp, "G", x);
  float* out = sums.mutable_data_ptr<float>();
  if (c.side == Side::right) {
    check_cuda(kOp, cuda::launch_row_squares(type, x.const_data_ptr(), x.stride(0), x.size(0), x.size(1), out, stream));
    return sums;
  }
  const Tensor partial = empty_like_shape(x, {ceil_div(x.size(0), cuda::kSquareRows), c.channels}, ScalarType::Float);
  check_cuda(kOp, cuda::launch_column_squares(type, x.const_data_ptr(), x.stride(0), x.size(0), x.size(1),
                                              partial.mutable_data_ptr<float>(), out, stream));
  return sums;
}

void apollo_cuda(const Tensor& W, const Tensor& G, const Tensor& N, const Tensor& R, const Tensor& norm,
                 const Tensor& lr, Text side, Text kind, double alpha, double limiter, double weight_decay,
                 MaybeTensor left, MaybeTensor right, MaybeTensor found_inf, int64_t round_mode, MaybeTensor rng) {
  const UpdateOptions options = {lr, alpha, weight_decay, found_inf, round_mode, rng};
  const Call c = check_call(W, G, N, R, norm, side, kind, left, right, options);
  if (W.numel() == 0) return;
  const DeviceScope scope(W);
  const cudaStream_t stream = current_stream(kOp, W.get_device_index());
  const cuda::DeviceUpdate update = device_update(options);
  const Tensor squares[3] = {squares_cuda(c, c.N, stream), squares_cuda(c, c.R, stream), squares_cuda(c, c.G, stream)};
  const Tensor factor = empty_like_shape(squares[0], {c.per_tensor ? 1 : c.channels});
  check_cuda(kOp, cuda::launch_apollo_factors(
                      {squares[0].const_data_ptr<float>(), squares[1].const_data_ptr<float>(),
                       squares[2].const_data_ptr<float>(), c.channels, c.per_tensor, c.residual, float(limiter)},
                      update.found_inf, norm.mutable_data_ptr<float>(), factor.mutable_data_ptr<float>(), stream));

  const DType type = float_type(kOp, "W", W);
  void* w = W.mutable_data_ptr();
  const auto apply = [&](const UpdateOperands& operands, int64_t first, int64_t rows) {
    check_cuda(kOp, cuda::launch_update(type, w, c.m, {first, first + rows}, operands, update, stream));
  };
  const UpdateOperands operands = operands_of(c, factor);
  if (!c.residual) return apply(operands, 0, c.n);
  BackProjection product(kOp, less_scaled(c, factor), left, right, c.n, c.m);
  for_slices(product, c.n, apply, operands);
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("apollo_scale_update_", TORCH_BOX(&apollo_cpu));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("apollo_scale_update_", TORCH_BOX(&apollo_cuda));
}
#endif

}  // namespace slk
