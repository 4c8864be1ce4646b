// adam_q_, adam_q_dir_, ademamix_q_ and momentum_q_ on the CPU: their arguments as one step.
#include "torch/optim_step.h"

namespace slk::optim {
namespace {

using OptionalTensor = std::optional<Tensor>;
using cpu::StepTensor;

void adam_q_(Tensors params, Tensors grads, Tensors m, Tensors m_scale, Tensors v, Tensors v_scale, Tensors master_lo,
             const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
             bool decoupled, Text codec, int64_t block, OptionalTensor grad_scale, OptionalTensor found_inf,
             int64_t round_mode, OptionalTensor rng, OptionalTensor nonfinite) {
  constexpr const char* op = "adam_q_";
  const StepLists lists = {
      op,
      params,
      grads,
      {{"m", "m_scale", m, m_scale, &StepTensor::m, false}, {"v", "v_scale", v, v_scale, &StepTensor::v, true}},
      master_lo,
      false};
  const StepTensors in = {&step, &lr, nullptr, nullptr, grad_scale, found_inf, rng, nonfinite, round_mode};
  run_step(lists, in, {Rule::adam, beta1, beta2, eps, weight_decay, decoupled}, codec_of(op, codec, true), block,
           cpu::optim_kernels().adam);
}

void adam_q_dir_(Tensors grads, Tensors m, Tensors m_scale, Tensors v, Tensors v_scale, Tensors out, const Tensor& step,
                 double beta1, double beta2, double eps, Text codec, int64_t block, OptionalTensor grad_scale,
                 OptionalTensor found_inf, OptionalTensor nonfinite) {
  constexpr const char* op = "adam_q_dir_";
  const Tensors none;
  const StepLists lists = {
      op,    out,
      grads, {{"m", "m_scale", m, m_scale, &StepTensor::m, false}, {"v", "v_scale", v, v_scale, &StepTensor::v, true}},
      none,  true};
  const StepTensors in = {&step, nullptr, nullptr, nullptr, grad_scale, found_inf, std::nullopt, nonfinite, 0};
  run_step(lists, in, {Rule::adam_direction, beta1, beta2, eps, 0.0, true}, codec_of(op, codec, true), block,
           cpu::optim_kernels().adam);
}

void ademamix_q_(Tensors params, Tensors grads, Tensors m, Tensors m_scale, Tensors m_slow, Tensors m_slow_scale,
                 Tensors v, Tensors v_scale, Tensors master_lo, const Tensor& step, const Tensor& lr,
                 const Tensor& beta3, const Tensor& alpha, double beta1, double beta2, double eps, double weight_decay,
                 bool decoupled, Text codec, int64_t block, OptionalTensor grad_scale, OptionalTensor found_inf,
                 int64_t round_mode, OptionalTensor rng, OptionalTensor nonfinite) {
  constexpr const char* op = "ademamix_q_";
  const StepLists lists = {op,
                           params,
                           grads,
                           {{"m", "m_scale", m, m_scale, &StepTensor::m, false},
                            {"m_slow", "m_slow_scale", m_slow, m_slow_scale, &StepTensor::slow, false},
                            {"v", "v_scale", v, v_scale, &StepTensor::v, true}},
                           master_lo,
                           false};
  const StepTensors in = {&step, &lr, &beta3, &alpha, grad_scale, found_inf, rng, nonfinite, round_mode};
  run_step(lists, in, {Rule::ademamix, beta1, beta2, eps, weight_decay, decoupled}, codec_of(op, codec, true), block,
           cpu::optim_kernels().ademamix);
}

Rule rule_of(const char* op, const std::string& name) {
  if (name == "lion") return Rule::lion;
  if (name == "sgd") return Rule::sgd;
  if (name == "nesterov") return Rule::nesterov;
  check(name == "signum", op, "rule must be 'lion', 'sgd', 'nesterov' or 'signum', got '", name, "'");
  return Rule::signum;
}

void momentum_q_(Tensors params, Tensors grads, Tensors m, Tensors m_scale, Tensors master_lo, const Tensor& step,
                 const Tensor& lr, double beta1, double beta2, double weight_decay, Text rule_name, Text codec,
                 int64_t block, OptionalTensor grad_scale, OptionalTensor found_inf, int64_t round_mode,
                 OptionalTensor rng, OptionalTensor nonfinite) {
  constexpr const char* op = "momentum_q_";
  const Rule rule = rule_of(op, rule_name);
  const StepLists lists = {op, params, grads, {{"m", "m_scale", m, m_scale, &StepTensor::m, false}}, master_lo, false};
  const StepTensors in = {&step, &lr, nullptr, nullptr, grad_scale, found_inf, rng, nonfinite, round_mode};
  const bool decoupled = rule == Rule::lion || rule == Rule::signum;
  run_step(lists, in, {rule, beta1, beta2, 0.0, weight_decay, decoupled}, codec_of(op, codec, true), block,
           cpu::optim_kernels().momentum);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(slkernels, CPU, m) {
  m.impl("adam_q_", TORCH_BOX(&adam_q_));
  m.impl("adam_q_dir_", TORCH_BOX(&adam_q_dir_));
  m.impl("ademamix_q_", TORCH_BOX(&ademamix_q_));
  m.impl("momentum_q_", TORCH_BOX(&momentum_q_));
}

#ifdef SLKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(slkernels, CUDA, m) {
  m.impl("adam_q_", TORCH_BOX(&adam_q_));
  m.impl("adam_q_dir_", TORCH_BOX(&adam_q_dir_));
  m.impl("ademamix_q_", TORCH_BOX(&ademamix_q_));
  m.impl("momentum_q_", TORCH_BOX(&momentum_q_));
}
#endif

}  // namespace slk::optim
