// Family `lowrank` at the torch boundary.
#include "torch/lowrank.h"

#include "slkernels/lowrank.h"
#include "slkernels/sparse.h"
#include "torch/support.h"

namespace slk {

Tensor sum_of_products(const std::vector<Product>& products, const Tensor* bias) {
  const Tensor& like = products[0].x;
  const int64_t tokens = like.size(0), n = products[0].w.size(0);
  const DType dtype = dtype_of("linear", "x", like);
  Tensor out = empty_like_shape(like, {tokens, n});
  bool skinny = !like.is_cuda() && dtype != DType::f64 && tokens <= cpu::kSkinnyTokens;
  for (const Product& p : products) {
    const int64_t k = p.w.size(1);
    skinny = skinny && k > 0 && (p.w.stride(1) == 1 || k == 1);
  }
  if (!skinny) {
    bool first = true;
    for (const Product& p : products) {
      addmm_out(out, first && bias ? *bias : out, p.x, t2(p.w), first && !bias ? 0 : 1, p.alpha);
      first = false;
    }
    return out;
  }
  const Tensor y32 = dtype == DType::f32 ? out : empty_like_shape(like, {tokens, n}, ScalarType::Float);
  const Tensor b = bias ? as_contiguous(*bias) : Tensor();
  float* y = y32.mutable_data_ptr<float>();
  bool accumulate = false;
  for (const Product& p : products) {
    const Tensor x32 = values_f32(p.x);
    const int64_t k = p.w.size(1), grain = std::max<int64_t>(16, (1 << 18) / (k * std::max<int64_t>(tokens, 1)));
    parallel_for(n, grain, [&](int64_t begin, int64_t end) {
      cpu::lowrank_kernels().skinny(dtype, x32.const_data_ptr<float>(), tokens, p.w.const_data_ptr(), p.w.stride(0), k,
                                    n, {begin, end}, float(p.alpha), bias ? b.const_data_ptr() : nullptr, accumulate,
                                    y);
    });
    accumulate = true;
  }
  if (dtype != DType::f32) cpu::sparse_kernels().from_f32(dtype, y, out.mutable_data_ptr(), {0, tokens * n});
  return out;
}

Tensor linear(const Tensor& x, const Tensor& w, double alpha, const Tensor* bias) {
  return sum_of_products({{x, w, alpha}}, bias);
}

void check_bias(const char* op, const Tensor& bias, int64_t n, const Tensor& x) {
  check(bias.dim() == 1 && bias.size(0) == n, op, "bias must be [", n, "], got ", show(bias));
  check_same_dtype(op, "bias", bias, "x", x);
  check_same_device(op, "bias", bias, "x", x);
}

void check_base(const char* op, const Tensor& base, int64_t n, int64_t m, const Tensor& x) {
  check(base.dim() == 2 && base.size(0) == n && base.size(1) == m, op, "base must be [", n, ", ", m, "], got ",
        show(base));
  check_same_dtype(op, "base", base, "x", x);
  check_same_device(op, "base", base, "x", x);
}

namespace {

enum class Activation { none, relu, silu, gelu };

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  check(name == "gelu", "lowrank_linear", "activation must be none, relu, silu or gelu, got ", name);
  return Activation::gelu;
}

Activation activation_of(const char* op, int64_t number) {
  check(number >= 0 && number <= int64_t(Activation::gelu), op, "activation must be in [0, 3], got ", number);
  return Activation(number);
}

Tensor activate(Activation f, const Tensor& z) {
  switch (f) {
    case Activation::none:
      break;
    case Activation::relu:
      return aten("aten::relu", "", z);
    case Activation::silu:
      return aten("aten::silu", "", z);
    case Activation::gelu:
      return aten("aten::gelu", "", z, std::string("none"));
  }
  return z;
}

Tensor activation_backward(Activation f, const Tensor& dh, const Tensor& z, const Tensor& h) {
  switch (f) {
    case Activation::none:
      break;
    case Activation::relu:
      return aten("aten::mul", "Tensor", dh, aten("aten::sign", "", h));  // h >= 0: its sign is z > 0
    case Activation::silu:
      return aten("aten::silu_backward", "", dh, z);
    case Activation::gelu:
      return aten("aten::gelu_backward", "", dh, z, std::string("none"));
  }
  return dh;
}

void check_gate(const std::optional<Tensor>& gate, int64_t rank, const Tensor& x) {
  if (!gate) return;
  check(gate->dim() == 1 && gate->size(0) == rank, "lowrank_linear", "gate must be [", rank, "], got ", show(*gate));
  check_same_dtype("lowrank_linear", "gate", *gate, "x", x);
}

// (y, z): z = x A^T is what backward needs besides the inputs.
std::tuple<Tensor, Tensor> lowrank_linear_forward(const Tensor& x, const Tensor& A, const Tensor& B, double alpha,
                                                  std::optional<Tensor> gate, int64_t activation,
                                                  std::optional<Tensor> bias, std::optional<Tensor> base) {
  const char* op = "lowrank_linear";
  const Activation f = activation_of(op, activation);
  dtype_of(op, "x", x);
  check(A.dim() == 2, op, "A must be [rank, m], got ", show(A));
  check(B.dim() == 2, op, "B must be [n, rank], got ", show(B));
  const int64_t n = B.size(0), rank = A.size(0);
  check_lowrank(op, A, B, n, A.size(1), "x", x);
  check(rank >= 1, op, "rank must be at least 1");
  check_gate(gate, rank, x);
  if (bias) check_bias(op, *bias, n, x);
  if (base) check_base(op, *base, n, A.size(1), x);
  const Tensor x2 = as_tokens(op, "x", x, A.size(1));
  const Tensor z = linear(x2, A, 1, nullptr);
  Tensor h = activate(f, z);
  if (gate) h = aten("aten::mul", "Tensor", h, *gate);
  std::vector<Product> products;
  if (base) products.push_back({x2, *base, 1});
  products.push_back({h, B, alpha});
  const Tensor y = sum_of_products(products, bias ? &*bias : nullptr);
  Shape shape = shape_of(x);
  shape.back() = n;
  return {torch::stable::view(y, {shape.data(), shape.size()}), z};
}

// Gradients of x, A, B, gate and base; an empty tensor stands for one that is not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& z, double alpha,
    std::optional<Tensor> gate, int64_t activation, std::optional<Tensor> base, bool need_x, bool need_a, bool need_b,
    bool need_gate, bool need_base) {
  const char* op = "lowrank_linear_backward";
  const Activation f = activation_of(op, activation);
  const Tensor dy2 = as_tokens(op, "dy", dy, B.size(0)), x2 = as_tokens(op, "x", x, A.size(1));
  const Tensor none = empty_like_shape(x, {0});
  Tensor dx = none, da = none, db = none, dgate = none, dbase = none;
  const Tensor h = activate(f, z);
  if (need_b) {
    db = empty_like_shape(x, {B.size(0), B.size(1)});
    addmm_out(db, db, t2(dy2), gate ? aten("aten::mul", "Tensor", h, *gate) : h, 0, alpha);
  }
  if (need_base) {
    dbase = empty_like_shape(x, {B.size(0), A.size(1)});
    addmm_out(dbase, dbase, t2(dy2), x2, 0, 1);
  }
  if (!(need_x || need_a || need_gate)) return {dx, da, db, dgate, dbase};
  Tensor dh = empty_like_shape(x, {dy2.size(0), B.size(1)});  // gradient of act(z) * gate
  addmm_out(dh, dh, dy2, B, 0, alpha);
  if (need_gate) {
    const int64_t tokens = 0;
    dgate = torch::stable::sum(aten("aten::mul", "Tensor", dh, h),
                               std::optional<torch::headeronly::IntHeaderOnlyArrayRef>({&tokens, 1}));
  }
  if (gate) dh = aten("aten::mul", "Tensor", dh, *gate);
  const Tensor dz = activation_backward(f, dh, z, h);
  if (need_x) {
    dx = empty_like_shape(x, shape_of(x));
    const Tensor dx2 = as_tokens(op, "dx", dx, A.size(1));
    addmm_out(dx2, dx2, dz, A, 0, 1);
    if (base) addmm_out(dx2, dx2, dy2, *base, 1, 1);
  }
  if (need_a) {
    da = empty_like_shape(x, {A.size(0), A.size(1)});
    addmm_out(da, da, t2(dz), x2, 0, 1);
  }
  return {dx, da, db, dgate, dbase};
}

// The public op: _lowrank_linear without z. Composite, so that autograd sees the op that returns z and can keep it.
Tensor lowrank_linear(const Tensor& x, const Tensor& A, const Tensor& B, double alpha, std::optional<Tensor> gate,
                      Text activation, std::optional<Tensor> bias, std::optional<Tensor> base) {
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(x),     from(A),    from(B),
                                    from(alpha), from(gate), from(int64_t(activation_of(activation))),
                                    from(bias),  from(base)};
  call_op("slkernels::_lowrank_linear", stack);
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  torch::stable::detail::to<Tensor>(stack[1]);  // releases z
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("_lowrank_linear", TORCH_BOX(&lowrank_linear_forward));
  m.impl("_lowrank_linear_backward", TORCH_BOX(&lowrank_linear_backward));
}
#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("_lowrank_linear", TORCH_BOX(&lowrank_linear_forward));
  m.impl("_lowrank_linear_backward", TORCH_BOX(&lowrank_linear_backward));
}
#endif
STABLE_TORCH_LIBRARY_IMPL(slkernels, CompositeImplicitAutograd, m) {
  m.impl("lowrank_linear", TORCH_BOX(&lowrank_linear));
}

}  // namespace slk
