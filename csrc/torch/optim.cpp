// Family `optim` at the torch boundary: checks, the step's scalars, threads over the flattened block list.
#include "slkernels/optim.h"

#include <algorithm>
#include <cmath>

#include "torch/tensor.h"

namespace slk {
namespace {

using Tensors = std::vector<Tensor>;

// Elements that are worth another thread.
constexpr int64_t kGrainElements = 16384;

int64_t grain_blocks(int64_t block) {
  return std::max<int64_t>(1, kGrainElements / block);
}

Codec codec_of(const char* op, const std::string& name) {
  check(name == "dyn8" || name == "dyn8u", op, "codec must be 'dyn8' or 'dyn8u', got '", name, "'");
  return name == "dyn8" ? Codec::dyn8 : Codec::dyn8u;
}

void check_block(const char* op, int64_t block) {
  check(block >= kQuantBlockMultiple && block <= kMaxQuantBlock && block % kQuantBlockMultiple == 0, op,
        "block must be a multiple of ", kQuantBlockMultiple, " from ", kQuantBlockMultiple, " to ", kMaxQuantBlock,
        ", got ", block);
}

DType float_type_of(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, name,
        " must be float32, bfloat16 or float16, got ", show(type));
  return dtype_of(op, name, t);
}

// ---- quantize_block, dequantize_block -----------------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantize_block(const Tensor& x, std::string codec_name, int64_t block, int64_t round_mode,
                                          std::optional<Tensor> rng) {
  constexpr const char* op = "quantize_block";
  check(round_mode == 0, op, "round_mode ", round_mode, " is not supported yet; supported: 0 (nearest even)");
  check(!rng.has_value(), op, "rng is not supported yet; pass None");
  const Codec codec = codec_of(op, codec_name);
  check_block(op, block);
  const DType dtype = float_type_of(op, "x", x);
  const Tensor in = as_contiguous(x);
  const int64_t n = in.numel(), blocks = ceil_div(n, block);
  Tensor codes = empty_like_shape(in, shape_of(in), ScalarType::Byte);
  Tensor scale = empty_like_shape(in, {blocks}, ScalarType::Float);
  const void* from = in.const_data_ptr();
  uint8_t* code_data = codes.mutable_data_ptr<uint8_t>();
  float* scale_data = scale.mutable_data_ptr<float>();
  parallel_for(blocks, grain_blocks(block), [&](int64_t b, int64_t e) {
    cpu::optim_kernels().quantize(codec, dtype, from, n, block, {b, e}, code_data, scale_data);
  });
  return {codes, scale};
}

Tensor dequantize_block(const Tensor& codes, const Tensor& scale, std::string codec_name, int64_t block,
                        std::optional<ScalarType> out_type, std::optional<int64_t> numel) {
  constexpr const char* op = "dequantize_block";
  check(!numel || *numel == codes.numel(), op, "numel must be the number of codes, ", codes.numel());
  const Codec codec = codec_of(op, codec_name);
  check_block(op, block);
  check(codes.scalar_type() == ScalarType::Byte, op, "codes must be uint8, got ", show(codes.scalar_type()));
  check(scale.scalar_type() == ScalarType::Float, op, "scale must be float32, got ", show(scale.scalar_type()));
  const int64_t n = codes.numel(), blocks = ceil_div(n, block);
  check(scale.dim() == 1 && scale.size(0) == blocks, op, "scale must be [", blocks, "], got ", show(scale));
  check_same_device(op, "scale", scale, "codes", codes);
  const Tensor code_in = as_contiguous(codes), scale_in = as_contiguous(scale);
  Tensor out = empty_like_shape(code_in, shape_of(code_in), out_type.value_or(ScalarType::Float));
  const DType dtype = float_type_of(op, "dtype", out);
  const uint8_t* code_data = code_in.const_data_ptr<uint8_t>();
  const float* scale_data = scale_in.const_data_ptr<float>();
  void* to = out.mutable_data_ptr();
  parallel_for(blocks, grain_blocks(block), [&](int64_t b, int64_t e) {
    cpu::optim_kernels().dequantize(codec, dtype, code_data, scale_data, n, block, {b, e}, to);
  });
  return out;
}

// ---- adam_q_ ------------------------------------------------------------------------------------------------------

constexpr const char* kAdam = "adam_q_";

float scalar_of(const char* name, const Tensor& t) {
  if (t.numel() != 1 || t.scalar_type() != ScalarType::Float)
    check(false, kAdam, name, " must be a float32 tensor with one element, got ", show(t.scalar_type()), " ", show(t));
  return *t.const_data_ptr<float>();
}

void check_length(const char* name, const Tensors& list, size_t count) {
  check(list.size() == count, kAdam, name, " must have as many tensors as params, ", count, ", got ", list.size());
}

// Throws adam_q_'s error. The callers test first: with hundreds of tensors, building unused messages costs more than
// the step.
template <class... Parts>
void fail(const char* list, size_t i, const Parts&... parts) {
  check(false, kAdam, list, "[", i, "]", parts...);
}

void check_state(const char* name, const char* scale_name, size_t i, const Tensor& state, const Tensor& scale,
                 int64_t n, int64_t blocks, bool quantized) {
  const ScalarType type = quantized ? ScalarType::Byte : ScalarType::Float;
  if (state.scalar_type() != type || state.numel() != n || !state.is_contiguous())
    fail(name, i, " must be contiguous ", show(type), " with ", n, " elements, got ", show(state.scalar_type()), " ",
         show(state));
  const int64_t scales = quantized ? blocks : 0;
  if (scale.scalar_type() != ScalarType::Float || scale.numel() != scales || !scale.is_contiguous())
    fail(scale_name, i, " must be contiguous float32 with ", scales, " elements, got ", show(scale.scalar_type()), " ",
         show(scale));
}

// Views of tensor i. `copies` keeps a contiguous copy of the gradient alive where it has to be made.
cpu::AdamTensor adam_tensor(size_t i, const Tensor& p, const Tensor& g, const Tensor& m, const Tensor& m_scale,
                            const Tensor& v, const Tensor& v_scale, int64_t block, Tensors& copies) {
  const int64_t n = p.numel();
  const ScalarType type = p.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half)
    fail("params", i, " must be float32, bfloat16 or float16, got ", show(type));
  if (!p.is_contiguous()) fail("params", i, " must be contiguous");
  if (g.scalar_type() != type)
    fail("grads", i, " must have its parameter's dtype ", show(type), ", got ", show(g.scalar_type()));
  if (g.numel() != n || shape_of(g) != shape_of(p))
    fail("grads", i, " must have its parameter's shape ", show(p), ", got ", show(g));
  const bool quantized = m.scalar_type() == ScalarType::Byte;
  if (!quantized && m.scalar_type() != ScalarType::Float)
    fail("m", i, " must be uint8 (quantized) or float32, got ", show(m.scalar_type()));
  const int64_t blocks = ceil_div(n, block);
  check_state("m", "m_scale", i, m, m_scale, n, blocks, quantized);
  check_state("v", "v_scale", i, v, v_scale, n, blocks, quantized);
  const void* grad = g.const_data_ptr();
  if (!g.is_contiguous()) {
    copies.push_back(torch::stable::contiguous(g));
    grad = copies.back().const_data_ptr();
  }
  return {p.mutable_data_ptr(),
          grad,
          m.mutable_data_ptr(),
          v.mutable_data_ptr(),
          quantized ? static_cast<float*>(m_scale.mutable_data_ptr()) : nullptr,
          quantized ? static_cast<float*>(v_scale.mutable_data_ptr()) : nullptr,
          n,
          dtype_of(kAdam, "params", p)};
}

cpu::AdamStep adam_step(float t, float lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                        double grad_scale) {
  cpu::AdamStep s;
  s.beta1 = float(beta1);
  s.one_minus_beta1 = float(1 - beta1);
  s.beta2 = float(beta2);
  s.one_minus_beta2 = float(1 - beta2);
  s.eps = float(eps);
  s.decay = float(decoupled ? 1 - double(lr) * weight_decay : 1.0);
  s.l2 = float(decoupled ? 0.0 : weight_decay);
  s.step_size = float(double(lr) / (1 - std::pow(beta1, double(t))));
  s.inv_sqrt_bias2 = float(1 / std::sqrt(1 - std::pow(beta2, double(t))));
  s.inv_grad_scale = float(1 / grad_scale);
  return s;
}

// parallel_for over the blocks of all tensors as one list, so that many small tensors are as parallel as a large one.
void run_adam(const std::vector<cpu::AdamTensor>& tensors, const cpu::AdamStep& step, int64_t block) {
  std::vector<int64_t> first(tensors.size() + 1, 0);  // the first block of each tensor in the flattened list
  for (size_t i = 0; i < tensors.size(); ++i) first[i + 1] = first[i] + ceil_div(tensors[i].n, block);
  const auto& kernels = cpu::optim_kernels();
  parallel_for(first.back(), grain_blocks(block), [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      if (begin < stop) kernels.adam(tensors[i], step, block, {begin - first[i], stop - first[i]});
      begin = std::max(begin, stop);
    }
  });
}

void adam_q_(Tensors params, Tensors grads, Tensors m, Tensors m_scale, Tensors v, Tensors v_scale, Tensors master_lo,
             const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
             bool decoupled, std::string codec, int64_t block, std::optional<Tensor> grad_scale,
             std::optional<Tensor> found_inf, int64_t round_mode, std::optional<Tensor> rng,
             std::optional<Tensor> nonfinite) {
  check(!nonfinite.has_value(), kAdam, "nonfinite is not supported yet; pass None");
  check(codec == "dyn8", kAdam, "codec '", codec, "' is not supported yet; supported: 'dyn8'");
  check(master_lo.empty(), kAdam, "master_lo is not supported yet; pass an empty list");
  check(round_mode == 0, kAdam, "round_mode ", round_mode, " is not supported yet; supported: 0 (nearest even)");
  check(!rng.has_value(), kAdam, "rng is not supported yet; pass None");
  check_block(kAdam, block);
  check_length("grads", grads, params.size());
  check_length("m", m, params.size());
  check_length("m_scale", m_scale, params.size());
  check_length("v", v, params.size());
  check_length("v_scale", v_scale, params.size());

  Tensors copies;
  std::vector<cpu::AdamTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i)
    tensors[i] = adam_tensor(i, params[i], grads[i], m[i], m_scale[i], v[i], v_scale[i], block, copies);
  const float t = scalar_of("step", step), rate = scalar_of("lr", lr);
  const float scale = grad_scale ? scalar_of("grad_scale", *grad_scale) : 1.0f;
  if (found_inf && scalar_of("found_inf", *found_inf) != 0) return;
  run_adam(tensors, adam_step(t, rate, beta1, beta2, eps, weight_decay, decoupled, scale), block);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("quantize_block", TORCH_BOX(&quantize_block));
  m.impl("dequantize_block", TORCH_BOX(&dequantize_block));
  m.impl("adam_q_", TORCH_BOX(&adam_q_));
}

}  // namespace slk
