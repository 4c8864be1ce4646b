// Low-rank products of one input (q, k, v; gate, up) at the torch boundary: the contract of SharedInput in lowrank.h.
#include "torch/lowrank.h"

namespace slk {

void check_shared_input(const char* op, const Tensor& x, const SharedInput& layer) {
  dtype_of(op, "x", x);
  check(layer.A.dim() == 2, op, "A must be [sum of ranks, m], got ", show(layer.A));
  check_same_dtype(op, "A", layer.A, "x", x);
  check_same_device(op, "A", layer.A, "x", x);
  check(!layer.B.empty(), op, "B must hold at least one tensor");
  const size_t count = layer.B.size();
  int64_t ranks = 0;
  for (const Tensor& B : layer.B) {
    check(B.dim() == 2, op, "B must be [n, rank] each, got ", show(B));
    check(B.size(1) >= 1, op, "ranks must be at least 1");
    check_same_dtype(op, "B", B, "x", x);
    check_same_device(op, "B", B, "x", x);
    ranks += B.size(1);
  }
  check(layer.A.size(0) == ranks, op, "A must be [", ranks, ", m], the sum of B's ranks, got ", show(layer.A));
  const auto one_each = [&](const char* name, size_t got) {
    check(got == 0 || got == count, op, name, " must hold ", count, ", one for each B, got ", got);
  };
  one_each("alpha", layer.alpha.size());
  one_each("bias", layer.bias.size());
  one_each("base", layer.base.size());
  for (size_t i = 0; i < layer.bias.size(); ++i) check_bias(op, layer.bias[i], layer.B[i].size(0), x);
  for (size_t i = 0; i < layer.base.size(); ++i) check_base(op, layer.base[i], layer.B[i].size(0), layer.A.size(1), x);
}

Tensors parts(const SharedInput& layer, const Tensor& z) {
  Tensors views;
  int64_t first = 0;
  for (size_t i = 0; i < layer.B.size(); ++i) {
    Tensor whole = z;
    views.push_back(torch::stable::narrow(whole, 1, first, layer.rank(i)));
    first += layer.rank(i);
  }
  return views;
}

Tensors shared_forward(const SharedInput& layer, const Tensor& x, const Tensor& z) {
  const Tensors zs = parts(layer, z);
  Tensors ys;
  for (size_t i = 0; i < layer.B.size(); ++i) {
    std::vector<Product> products;
    if (!layer.base.empty()) products.push_back({x, layer.base[i], 1});
    products.push_back({zs[i], layer.B[i], layer.scale(i)});
    ys.push_back(sum_of_products(products, layer.bias.empty() ? nullptr : &layer.bias[i]));
  }
  return ys;
}

SharedGradients shared_backward(const SharedInput& layer, const Tensors& dy, const Tensor& x, const Tensor& z,
                                SharedNeeds need) {
  const size_t count = layer.B.size();
  SharedGradients grad = {empty_like_shape(x, need.x ? shape_of(x) : Shape{0}),
                          empty_like_shape(x, need.A ? shape_of(layer.A) : Shape{0}),
                          {},
                          {}};
  if (need.B) {
    const Tensors zs = parts(layer, z);
    for (size_t i = 0; i < count; ++i) {
      grad.B.push_back(empty_like_shape(x, shape_of(layer.B[i])));
      addmm_out(grad.B[i], grad.B[i], t2(dy[i]), zs[i], 0, layer.scale(i));
    }
  }
  if (need.base)
    for (size_t i = 0; i < count; ++i) {
      grad.base.push_back(empty_like_shape(x, shape_of(layer.base[i])));
      addmm_out(grad.base[i], grad.base[i], t2(dy[i]), x, 0, 1);
    }
  if (!need.x && !need.A) return grad;
  const Tensor dz = empty_like_shape(x, {x.size(0), layer.A.size(0)});
  const Tensors dzs = parts(layer, dz);
  for (size_t i = 0; i < count; ++i) addmm_out(dzs[i], dzs[i], dy[i], layer.B[i], 0, layer.scale(i));
  if (need.x) {
    addmm_out(grad.x, grad.x, dz, layer.A, 0, 1);
    for (size_t i = 0; i < layer.base.size(); ++i) addmm_out(grad.x, grad.x, dy[i], layer.base[i], 1, 1);
  }
  if (need.A) addmm_out(grad.A, grad.A, t2(dz), x, 0, 1);
  return grad;
}

namespace {

constexpr const char* kOp = "lowrank_linear_multi";

using MaybeAlpha = std::optional<std::vector<double>>;
using MaybeTensors = std::optional<Tensors>;

SharedInput layer_of(const Tensor& A, const Tensors& B, const MaybeAlpha& alpha, const MaybeTensors& bias,
                     const MaybeTensors& base) {
  return {A, B, bias.value_or(Tensors()), base.value_or(Tensors()), alpha.value_or(std::vector<double>())};
}

// (ys, z): z = x A^T is what backward needs besides the inputs.
std::tuple<Tensors, Tensor> multi_forward(const Tensor& x, const Tensor& A, Tensors B, MaybeAlpha alpha,
                                          MaybeTensors bias, MaybeTensors base) {
  const SharedInput layer = layer_of(A, B, alpha, bias, base);
  check_shared_input(kOp, x, layer);
  const Tensor x2 = as_tokens(kOp, "x", x, A.size(1)), z = linear(x2, A, 1, nullptr);
  Tensors ys = shared_forward(layer, x2, z);
  Shape shape = shape_of(x);
  for (Tensor& y : ys) {
    shape.back() = y.size(1);
    y = torch::stable::view(y, {shape.data(), shape.size()});
  }
  return {ys, z};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> multi_backward(Tensors dy, const Tensor& x, const Tensor& A, Tensors B,
                                                            const Tensor& z, MaybeAlpha alpha, MaybeTensors base,
                                                            bool need_x, bool need_a, bool need_b, bool need_base) {
  const char* op = "_lowrank_linear_multi_backward";
  const SharedInput layer = layer_of(A, B, alpha, {}, base);
  check_shared_input(op, x, layer);
  check(dy.size() == B.size(), op, "dy must hold ", B.size(), ", one for each B, got ", dy.size());
  const Tensor x2 = as_tokens(op, "x", x, A.size(1));
  for (size_t i = 0; i < dy.size(); ++i) dy[i] = as_tokens(op, "dy", dy[i], B[i].size(0));
  const SharedGradients grad = shared_backward(layer, dy, x2, z, {need_x, need_a, need_b, need_base});
  const Shape shape = shape_of(x);
  return {need_x ? torch::stable::view(grad.x, {shape.data(), shape.size()}) : grad.x, grad.A, grad.B, grad.base};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("lowrank_linear_multi", TORCH_BOX(&multi_forward));
  m.impl("_lowrank_linear_multi_backward", TORCH_BOX(&multi_backward));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("lowrank_linear_multi", TORCH_BOX(&multi_forward));
  m.impl("_lowrank_linear_multi_backward", TORCH_BOX(&multi_backward));
}
#endif

}  // namespace slk
