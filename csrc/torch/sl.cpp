// Family `sl` at the torch boundary: y = x W^T + bias with W = alpha B A + S, without ever keeping W.
//
//   chain    y = alpha (x A^T) B^T + x S^T; backward by the same products and an sddmm.
//   compose  builds W, uses the dense library, and drops W; backward builds it again and reads dv, dA, dB off dW. A W
//            that the caller composed and keeps takes the place of both.
#include "slkernels/sl.h"
#include "slkernels/lowrank.h"
#include "torch/lowrank.h"
#include "torch/support.h"
#ifdef SLKERNELS_WITH_CUDA
#include "torch/stream.h"
#endif

namespace slk {
namespace {

struct Layer {
  Tensor A, B, values;
  Csr s;
  double alpha;
  std::optional<Tensor> weight;  // W, where the caller keeps it
  int64_t rank() const { return A.size(0); }
  Tensor composed() const { return weight ? *weight : compose_weight(s, values, &A, &B, alpha, nullptr); }
};

enum class Path { chain, compose };

// Time of one nonzero's multiply-add in spmm and sddmm, in dense multiply-adds (docs/paths.md). CPU: measured. CUDA:
// from counts, not measured yet: half of the 30 TFLOP/s that reading an operand a multiply-add from L1 allows, beside
// 600 dense ones.
constexpr double kSparseCostCpu = 3.5, kSparseCostCuda = 40;
// Up to here the cost is reading the weights once, and the chain reads fewer bytes.
constexpr int64_t kDecodeTokensCpu = cpu::kSkinnyTokens, kDecodeTokensCuda = 64;

Path choose_path(const std::string& path, const Layer& layer, const Tensor& x) {
  const int64_t tokens = x.size(0);
  const bool cuda = x.is_cuda();
  if (path == "chain") {
    check(!layer.weight, "sl_linear", "path chain does not use weight");
    return Path::chain;
  }
  if (path == "compose") return Path::compose;
  check(path == "auto", "sl_linear", "path must be auto, chain or compose, got ", path);
  if (layer.weight) return Path::compose;
  if (tokens <= (cuda ? kDecodeTokensCuda : kDecodeTokensCpu)) return Path::chain;
  const double n = double(layer.s.n), m = double(layer.s.m), r = double(layer.rank());
  const double chain =
      r * (m + n) + (cuda ? kSparseCostCuda : kSparseCostCpu) * double(layer.s.nnz);  // multiply-adds a token
  const double compose = n * m * (1 + r / double(tokens));
  return chain <= compose ? Path::chain : Path::compose;
}

Layer check_layer(const char* op, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& values,
                  const Tensor& crow, const Tensor& col, double alpha, std::optional<Tensor> weight, bool validate) {
  dtype_of(op, "x", x);
  check(A.dim() == 2, op, "A must be [rank, m], got ", show(A));
  check(B.dim() == 2, op, "B must be [n, rank], got ", show(B));
  const int64_t n = B.size(0), m = A.size(1);
  check_lowrank(op, A, B, n, m, "x", x);
  check(A.size(0) >= 1, op, "rank must be at least 1");
  check_same_device(op, "crow", crow, "x", x);
  check_same_device(op, "values", values, "x", x);
  const Csr s = as_csr(op, crow, col, n, m, validate);
  check(values.dim() == 1 && values.size(0) == s.nnz, op, "values must be [", s.nnz, "], got ", show(values));
  check_same_dtype(op, "values", values, "x", x);
  if (weight) {
    check(weight->dim() == 2 && weight->size(0) == n && weight->size(1) == m, op, "weight must be [", n, ", ", m,
          "], got ", show(*weight));
    check_same_dtype(op, "weight", *weight, "x", x);
    check_same_device(op, "weight", *weight, "x", x);
  }
  return {A, B, values, s, alpha, weight};
}

#ifdef SLKERNELS_WITH_CUDA
// The chain for a few tokens on a GPU: every weight is read once, by two kernels.
Tensor decode(const Layer& layer, const Tensor& x, const Tensor* bias) {
  constexpr const char* op = "sl_linear";
  const DType dtype = dtype_of(op, "x", x);
  const auto with_rows = [](const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : as_contiguous(t); };
  const Tensor A = with_rows(layer.A), B = with_rows(layer.B), values = as_contiguous(layer.values);
  const Tensor b = bias ? as_contiguous(*bias) : Tensor();
  const Tensor y = empty_like_shape(x, {x.size(0), layer.s.n});
  const Tensor z =
      empty_like_shape(x, {x.size(0), layer.rank()}, dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  const cuda::SlDecodeArgs args = {as_matrix(x),
                                   as_matrix(y),
                                   A.const_data_ptr(),
                                   B.const_data_ptr(),
                                   values.const_data_ptr(),
                                   bias ? b.const_data_ptr() : nullptr,
                                   layer.rank(),
                                   A.stride(0),
                                   B.stride(0),
                                   layer.alpha,
                                   z.mutable_data_ptr()};
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(op, cuda::launch_sl_decode(dtype, args, layer.s, current_stream(op, device)));
  return y;
}
#endif

Tensor forward(const Layer& layer, Path path, const Tensor& x, const Tensor* bias) {
  if (path == Path::compose) return linear(x, layer.composed(), 1, bias);
#ifdef SLKERNELS_WITH_CUDA
  if (x.is_cuda() && x.size(0) <= cuda::kDecodeTokens) return decode(layer, x, bias);
#endif
  const Tensor y = linear(linear(x, layer.A, 1, nullptr), layer.B, layer.alpha, bias);
  spmm_into(layer.s, layer.values, x, y, true);
  return y;
}

Tensor sl_linear(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& values, const Tensor& crow,
                 const Tensor& col, double alpha, std::optional<Tensor> bias, Text path, bool validate,
                 std::optional<Tensor> weight) {
  const char* op = "sl_linear";
  const Layer layer = check_layer(op, x, A, B, values, crow, col, alpha, weight, validate);
  const Csr& s = layer.s;
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == s.n, op, "bias must be [", s.n, "], got ", show(*bias));
    check_same_dtype(op, "bias", *bias, "x", x);
  }
  const Tensor x2 = as_tokens(op, "x", x, s.m);
  const Tensor* b = bias ? &*bias : nullptr;
  const Tensor y = forward(layer, choose_path(path, layer, x2), x2, b);
  Shape shape = shape_of(x);
  shape.back() = s.n;
  return torch::stable::view(y, {shape.data(), shape.size()});
}

struct Gradients {
  Tensor x, A, B, values;  // empty where not asked for
};

struct Needs {
  bool x, factors, values;
};

void chain_backward(const Layer& layer, const Tensor& dy, const Tensor& x, const Tensor& crow, Needs need,
                    Gradients& grad) {
  const Tensor& like = x;
  const int64_t tokens = x.size(0), rank = layer.rank();
  if (need.x || need.factors) {
    const Tensor dz = empty_like_shape(like, {tokens, rank});
    addmm_out(dz, dz, dy, layer.B, 0, layer.alpha);
    if (need.factors) {
      addmm_out(grad.A, grad.A, t2(dz), x, 0, 1);
      addmm_out(grad.B, grad.B, t2(dy), linear(x, layer.A, 1, nullptr), 0, layer.alpha);
    }
    if (need.x) addmm_out(grad.x, grad.x, dz, layer.A, 0, 1);
  }
  if (need.x) {
    const TransposedCsr t = transposed(layer.s, crow, layer.values);
    spmm_into(t.csr, t.values, dy, grad.x, true);
  }
  if (need.values) grad.values = sddmm_at(layer.s, dy, x);
}

void compose_backward(const Layer& layer, const Tensor& dy, const Tensor& x, Needs need, Gradients& grad) {
  if (need.x) addmm_out(grad.x, grad.x, dy, layer.composed(), 0, 1);
  if (!need.factors && !need.values) return;
  const Tensor dw = empty_like_shape(x, {layer.s.n, layer.s.m});
  addmm_out(dw, dw, t2(dy), x, 0, 1);
  if (need.values) grad.values = gather_at(layer.s, dw);
  if (need.factors) {
    addmm_out(grad.A, grad.A, t2(layer.B), dw, 0, layer.alpha);
    addmm_out(grad.B, grad.B, dw, t2(layer.A), 0, layer.alpha);
  }
}

// Gradients of x, A, B and values.
std::tuple<Tensor, Tensor, Tensor, Tensor> sl_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& A,
                                                              const Tensor& B, const Tensor& values, const Tensor& crow,
                                                              const Tensor& col, double alpha, Text path,
                                                              std::optional<Tensor> weight, bool need_x,
                                                              bool need_factors, bool need_values) {
  const char* op = "_sl_linear_backward";
  const Layer layer = check_layer(op, x, A, B, values, crow, col, alpha, weight, false);
  const Tensor x2 = as_tokens(op, "x", x, layer.s.m), dy2 = as_tokens(op, "dy", dy, layer.s.n);
  check(x2.size(0) == dy2.size(0), op, "dy and x must have the same tokens, got ", show(dy), " and ", show(x));
  const Needs need = {need_x, need_factors, need_values};
  const auto gradient = [&](bool needed, const Tensor& t) {
    return empty_like_shape(x, needed ? shape_of(t) : Shape{0});
  };
  Gradients grad = {gradient(need_x, x2), gradient(need_factors, A), gradient(need_factors, B),
                    gradient(false, values)};
  if (choose_path(path, layer, x2) == Path::chain)
    chain_backward(layer, dy2, x2, crow, need, grad);
  else
    compose_backward(layer, dy2, x2, need, grad);
  const Shape shape = shape_of(x);
  return {need_x ? torch::stable::view(grad.x, {shape.data(), shape.size()}) : grad.x, grad.A, grad.B, grad.values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("sl_linear", TORCH_BOX(&sl_linear));
  m.impl("_sl_linear_backward", TORCH_BOX(&sl_linear_backward));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("sl_linear", TORCH_BOX(&sl_linear));
  m.impl("_sl_linear_backward", TORCH_BOX(&sl_linear_backward));
}
#endif

}  // namespace slk
